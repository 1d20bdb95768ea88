"""The served model against the reference: eager, and compiled on one rank and on two."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mergequant.evaluate.perplexity import prompt_logprobs
from mergequant.model.reader import Reader
from mergequant_vllm.packing import unpack
from tests.engine import probe
from tests.engine.conftest import Reference, check_greedy, float32_engine

pytestmark = pytest.mark.engine

MERGED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class Engine:
    llm: Any
    ranks: int
    eager: bool


@pytest.fixture(
    scope="module",
    params=[(True, 1), (False, 1), (False, 2)],
    ids=["eager-1", "compiled-1", "compiled-2"],
)
def engine(request: pytest.FixtureRequest, served: Path) -> Iterator[Engine]:
    eager, ranks = request.param
    with float32_engine(served, eager, ranks) as llm:
        yield Engine(llm, ranks, eager)


def test_log_probabilities_are_as_close_as_one_ulp_lets_them(
    engine: Engine, references: dict[int, Reference]
) -> None:
    reference = references[engine.ranks]
    served = prompt_logprobs(engine.llm, reference.windows)
    difference = float((served - reference.logprobs).abs().mean())
    assert difference <= reference.control_mean


def test_greedy_tokens_are_the_references(engine: Engine, references: dict[int, Reference]) -> None:
    from vllm import SamplingParams

    reference = references[engine.ranks]
    prompts = reference.windows[:8, :24].tolist()
    sampling = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    outputs = engine.llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    clear = sum(
        check_greedy(reference, ids, list(output.outputs[0].token_ids))
        for ids, output in zip(prompts, outputs, strict=True)
    )
    assert clear > 0.5 * 8 * 48


def test_codes_and_integer_sums_equal_the_definition(
    engine: Engine, references: dict[int, Reference], served: Path
) -> None:
    """On the float input that each served linear really got."""
    from vllm import SamplingParams

    if not engine.eager or engine.ranks > 1:
        pytest.skip("inputs can be seen in an eager engine; its one rank reads whole inputs")
    names = engine.llm.apply_model(probe.start)[0]
    names.remove("lm_head")  # vLLM computes logits without calling it, so that no hook sees it
    assert len(names) == 4 * len(references[1].model.model.layers)
    engine.llm.apply_model(probe.forget)
    ids = references[1].windows[0].tolist()
    engine.llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1))
    linears = engine.llm.apply_model(probe.collect)[0]
    assert linears.keys() == set(names)
    reader = Reader(served)
    for name, tensors in linears.items():
        _check_linear(reader, name, tensors)


def _check_linear(reader: Reader, name: str, tensors: dict[str, Any]) -> None:
    parent, _, module = name.rpartition(".")
    parts = [f"{parent}.{part}" for part in MERGED.get(module, (module,))]
    if tensors["step"] is None:
        index, offset = (reader.read(f"{parts[0]}.input_{part}") for part in ("index", "offset"))
        units = (tensors["x"][:, index] + offset).double()
        assert units.shape[-1] > tensors["x"].shape[-1]
    else:
        clip = reader.read(f"{parts[0]}.input_clip")
        step = (tensors["x"].abs().amax(-1, keepdim=True) * clip * (1 / 7)).clamp(min=2.0**-100)
        assert torch.equal(tensors["step"], step)
        units = (tensors["x"] * step.reciprocal()).double()
    codes = units.round().clamp(-8, 7).to(torch.int64)
    assert torch.equal(tensors["codes"].to(torch.int64), codes), name
    weight = torch.cat(
        [unpack(reader.read(f"{part}.weight_packed"), 4, codes.shape[-1]) for part in parts]
    )
    sums = codes @ weight.to(torch.int64).T
    assert torch.equal(tensors["sums"].to(torch.int64), sums), name
    weight_step = torch.cat([reader.read(f"{part}.weight_scale") for part in parts])[:, 0].float()
    y = sums.float() * (1.0 if tensors["step"] is None else tensors["step"]) * weight_step
    if tensors["step"] is None:
        y = y + torch.cat([reader.read(f"{part}.output_offset") for part in parts])
    assert torch.equal(tensors["y"], y), name


def test_the_perplexity_command_agrees_with_the_references_within_its_control(
    served: Path, trained: Path, references: dict[int, Reference]
) -> None:
    text = trained / "heldout.txt"
    window = references[1].windows.shape[1]
    command = [Path(sys.executable).parent / "mergequant", "perplexity", served]
    options = ["--text", text, "--window", str(window), "--json"]
    done = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)
    assert result["engine"] == "vllm"
    assert result["tokens"] == references[1].logprobs.numel()
    assert abs(result["loss"] + float(references[1].logprobs.mean())) <= references[1].control_mean

"""A trained model and its checkpoint, made by the examples, and the reference's view of them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergequant import Options, quantize
from mergequant.calibration.sources import read_source
from mergequant.calibration.text import evaluation_windows
from mergequant.calibration.tokenizer import load_tokenizer
from mergequant.evaluate.perplexity import reference_logits, reference_logprobs, vllm_engine
from mergequant.evaluate.reference_forward import load_model
from mergequant.model.architectures import find

EXAMPLES = Path(__file__).parents[2] / "examples"
CONTROL_RUNS = 5
WINDOW = 240
# The defaults, on less text and with what is measured decided: K grows, copies have offsets.
WHOLE = Options(
    rotation="none",
    reconstruction="pad",
    alpha=0.0,
    statistics_samples=8,
    gptq_samples=32,
    compensation_samples=32,
    compensation_epochs=2,
    sequence_length=WINDOW,
)

pytest.importorskip("vllm")

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Functions that look at the served model are sent to vLLM's worker process.
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama trained for half a minute, with `train.txt` and `heldout.txt`."""
    folder = tmp_path_factory.mktemp("trained") / "tiny-llama"
    command = [sys.executable, EXAMPLES / "train_tiny.py", folder, "--steps", "300"]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """The beginning of the text that `trained` learned from."""
    text = tmp_path_factory.mktemp("calibration") / "calibration.txt"
    text.write_text((trained / "train.txt").read_text()[:60_000])
    return text


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, trained: Path, calibration_text: Path) -> Path:
    """`trained`, quantized with every step of the method on little text."""
    folder = tmp_path_factory.mktemp("served") / "tiny-llama-w4a4"
    return quantize(trained, folder, [calibration_text], WHOLE, progress=False)


@dataclass(frozen=True)
class Reference:
    """The reference forward on evaluation windows, and how far 1 ulp moves it.

    Attributes:
        windows: int64 [windows, length].
        logprobs: float64 [windows, length - 1].
        control_mean: mean |change| of a log-probability in the worst control run.
        control_largest: largest |change| in any control run.
    """

    model: Any
    windows: Tensor
    logprobs: Tensor
    control_mean: float
    control_largest: float


def perturb_by_one_ulp(model: Any, seed: int) -> list[Any]:
    """Multiply the input of every operation by 1 +- 2^-23 or 1, at random; returns the hooks.

    That is an implementation of the same arithmetic whose float32 operations are one unit in the
    last place away: any two correct ones differ by about as much.
    """
    generator = torch.Generator().manual_seed(seed)

    def hook(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ulps = torch.randint(-1, 2, inputs[0].shape, generator=generator)
        if not inputs[0].is_floating_point():
            return inputs
        return (inputs[0] * (1 + ulps.to(inputs[0].dtype) * 2**-23), *inputs[1:])

    operations = (
        module for block in _blocks(model) for module in block.modules() if not _parts(module)
    )
    return [module.register_forward_pre_hook(hook) for module in operations]


def _blocks(model: Any) -> Any:
    return model.get_submodule(find(model.config.model_type).blocks)


def _parts(module: Any) -> list[Any]:
    return list(module.children())


def make_reference(folder: Path, text: Path, ranks: int, most: int | None = None) -> Reference:
    """The reference of a checkpoint on the first `most` windows of a text."""
    model = load_model(folder, torch.float32, ranks)
    windows = evaluation_windows(read_source(str(text)), load_tokenizer(folder), WINDOW)[:most]
    logprobs = reference_logprobs(model, windows)
    changes = []
    for seed in range(CONTROL_RUNS):
        hooks = perturb_by_one_ulp(model, seed)
        changed = reference_logprobs(model, windows)
        changes.append((changed - logprobs).abs())
        for handle in hooks:
            handle.remove()
    return Reference(
        model=model,
        windows=windows,
        logprobs=logprobs,
        control_mean=max(float(change.mean()) for change in changes),
        control_largest=max(float(change.max()) for change in changes),
    )


@pytest.fixture(scope="session")
def references(trained: Path, served: Path) -> dict[int, Reference]:
    """The reference for each tensor-parallel size."""
    return {ranks: make_reference(served, trained / "heldout.txt", ranks) for ranks in (1, 2)}


@contextmanager
def float32_engine(folder: Path, eager: bool, ranks: int) -> Iterator[Any]:
    """`vllm.LLM` of a checkpoint; each tensor-parallel rank has a core of its own if there are."""
    if 0 < torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks need {ranks} GPUs")
    cores = sorted(os.sched_getaffinity(0))
    with pytest.MonkeyPatch.context() as patch:
        if ranks > 1 and len(cores) >= ranks:
            patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, cores[:ranks])))
        with vllm_engine(
            folder,
            quantization="mergequant",
            dtype="float32",
            enforce_eager=eager,
            tensor_parallel_size=ranks,
            max_model_len=256,
        ) as llm:
            yield llm


def check_greedy(reference: Reference, prompt: list[int], generated: list[int]) -> int:
    """Each generated token is the reference's best wherever its lead is above the control's change.

    Returns how many tokens were that clear.
    """
    tokens = torch.tensor(prompt + generated)[None]
    scores = reference_logits(reference.model, tokens)[0].to(torch.float64).log_softmax(-1)
    best = scores[len(prompt) - 1 : -1].topk(2, dim=-1)
    clear = best.values[:, 0] - best.values[:, 1] > reference.control_largest
    assert torch.equal(best.indices[:, 0][clear], torch.tensor(generated)[clear])
    return int(clear.sum())

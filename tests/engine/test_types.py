"""Every model type, quantized with every step of the method and served, against the reference."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models.bloom.modeling_bloom as bloom
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergequant import quantize
from mergequant.calibration.sources import read_source
from mergequant.calibration.text import evaluation_windows
from mergequant.calibration.tokenizer import load_tokenizer
from mergequant.evaluate.perplexity import reference_logprobs
from mergequant.evaluate.reference_forward import load_model
from mergequant.model.architectures import ARCHITECTURES
from tests.conftest import WHOLE
from tests.tiny import make_model, write_text

pytestmark = pytest.mark.engine

# What is made of each type; a name with a dash is a variant of the type before it.
CASES: dict[str, dict[str, Any]] = {name: {} for name in ARCHITECTURES}
CASES["llama-llama3"] = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
}
CASES["qwen2-yarn"] = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1_000_000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 32,
    }
}
CASES["gpt_neox-sequential"] = {"use_parallel_residual": False}
# Windows in all blocks; where only some have them, `tests.tiny` gives them by default.
WINDOWS = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}
WITH_WINDOWS = [name for name, table in ARCHITECTURES.items() if table.windows == "all"]
CASES |= {f"{name}-windows": WINDOWS for name in WITH_WINDOWS}
# What is made of a type beside what is made of all.
OPTIONS: dict[str, dict[str, Any]] = {
    "llama-fully_static": {
        "activations": "fully_static",
        "rotation": "offline",
        "static_bits": 8,
        "weight_bits": 8,
    },
    "opt-6_bits": {"static_bits": 6, "dynamic_bits": 6, "weight_bits": 6},
}
SERVED = sorted({*CASES, *OPTIONS})
PROGRAM = Path(__file__).with_name("serve_types.py")
LENGTH, MOST = 60, 24
# Two hundred roundings of numbers up to 16, the logits, by 2^-24 of them each.
ROUNDINGS = 200 * 16 * 2.0**-24


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Path]:
    """A checkpoint of each type, or of those that `-k` names."""
    words = str(request.config.getoption("keyword") or "").split()
    named = {kind for kind in SERVED if any(word in kind for word in words)}
    kinds = named if named and "not" not in words else set(SERVED)
    scratch = tmp_path_factory.mktemp("types")
    text = write_text(scratch / "text.txt", repeats=40)
    made = {}
    for kind in sorted(kinds):
        model_type = kind.partition("-")[0]
        source, sizes = scratch / "source" / kind, {"heads": 4, "kv_heads": 2, "hidden": 128}
        model = make_model(source, model_type, context=512, **sizes, **CASES.get(kind, {}))
        fields = {"rotation": "online", "compensation_rank": 0, **OPTIONS.get(kind, {})}
        if ARCHITECTURES[model_type].bare_inputs:
            fields["reconstruction"] = "none"
        options = WHOLE.model_copy(update=fields)
        made[kind] = quantize(model, scratch / kind, [text], options, progress=False)
    return made


@pytest.fixture(scope="module")
def windows(folders: dict[str, Path]) -> Tensor:
    """Token ids int64 [windows, length]."""
    first = next(iter(folders.values()))
    text = read_source(str(first.parent / "text.txt"))
    return evaluation_windows(text, load_tokenizer(first), LENGTH)[:MOST]


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path], windows: Tensor
) -> dict[str, Tensor]:
    """Log-probabilities that vLLM gives, by type and mode."""
    scratch = tmp_path_factory.mktemp("served")
    save_file({"windows": windows}, scratch / "windows.safetensors")
    output = scratch / "logprobs.safetensors"
    alike = [_with_equal_windows(folder, scratch) for folder in folders.values()]
    command = [sys.executable, PROGRAM, scratch / "windows.safetensors", output, *alike]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": root, "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(output)


def _with_equal_windows(folder: Path, scratch: Path) -> Path:
    """A checkpoint in whose windows vLLM sees as many tokens as transformers in the given one's."""
    config = json.loads((folder / "config.json").read_text())
    if not ARCHITECTURES[config["model_type"]].wider_windows:
        return folder
    copy = shutil.copytree(folder, scratch / folder.name)
    config["sliding_window"] -= 1
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("kind", SERVED)
def test_log_probabilities_are_the_references(
    folders: dict[str, Path],
    windows: Tensor,
    served: dict[str, Tensor],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # vLLM computes BLOOM's activation function exactly, transformers by a formula with tanh.
    monkeypatch.setattr(bloom, "BloomGelu", torch.nn.GELU)
    expected = reference_logprobs(load_model(folders[kind]), windows)
    for mode in ("eager", "compiled"):
        equal = (served[f"{kind}.{mode}"] - expected).abs() <= ROUNDINGS
        # A number that one of the two rounds to the next code moves the rest of its window; that
        # is rare. A wrong name, order or factor moves every window.
        alike = equal.long().cumprod(dim=1).sum(dim=1)
        assert float((alike == equal.shape[1]).float().mean()) > 0.5, (
            f"{mode}: equal up to {sorted(alike.tolist())} tokens of {equal.shape[1]} in the texts"
        )

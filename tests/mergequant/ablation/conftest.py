"""A quantizer that only copies, and `ablate` with it, on little text."""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergequant import Options
from mergequant.ablation import Ablation, ablate, measure
from mergequant.output.writer import REPORT
from mergequant.quantizer import in_memory
from mergequant.quantizer import run as pipeline

BASE = Options(
    statistics_samples=2,
    gptq_samples=2,
    sequence_length=32,
    reconstruction="prune",
    alpha=5.0,
    compensation_rank=2,
    device="cpu",
)
SETTINGS: dict[str, Any] = {
    "engine": "transformers",
    "window": 32,
    "most_windows": 2,
    "progress": False,
}


class Quantizer:
    """Copies the model instead, writes a report, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.exported: list[Options] = []
        self.in_memory: list[Options] = []
        self.baselines: list[Any] = []  # of those in memory
        self.fails: dict[str, BaseException] = {}  # by rotation

    def report(self, options: Options) -> list[dict[str, Any]]:
        columns = {"columns": 80} if options.reconstruction != "none" else None
        seconds = {"calibration": 1.0, "compensation": 2.0, "codes": 3.0}
        lines = []
        for block in range(2):
            start = f"model.layers.{block}"
            clip = {"lowest": 0.5, "mean": 0.8, "highest": 1.0}
            q = {"activations": "static", "clip": clip, "reconstruction": columns}
            down = {"activations": "dynamic", "clip": 0.7 - block / 10}
            lines += [
                {"linear": f"{start}.self_attn.q_proj", "seconds": seconds, **q},
                {"linear": f"{start}.mlp.down_proj", "seconds": seconds, **down},
            ]
        return lines

    def quantize(
        self, model: Path, output: Path, calibration: object, options: Options, *, progress: bool
    ) -> Path:
        self.exported.append(options)
        if error := self.fails.get(options.rotation):
            output.mkdir(parents=True, exist_ok=True)
            (output / "half").touch()
            raise error
        shutil.copytree(model, output, dirs_exist_ok=True)
        lines = self.report(options)
        (output / REPORT).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return output

    def quantize_in_memory(
        self, model: Path, calibration: object, options: Options, change: object, *, progress: bool
    ) -> tuple[Any, list[dict[str, Any]]]:
        self.in_memory.append(options)
        self.baselines.append(getattr(change, "__self__", None))
        return Model(), self.report(options)


class Model:
    """Stands for a loaded model."""

    def to(self, device: torch.device) -> "Model":
        return self


def logprobs(model: Model, windows: Tensor, progress: bool) -> Tensor:
    return torch.full((len(windows), windows.shape[1] - 1), -1.5, dtype=torch.float64)


@pytest.fixture
def quantizer(monkeypatch: pytest.MonkeyPatch) -> Quantizer:
    made = Quantizer()
    monkeypatch.setattr(measure, "load_model", lambda *_: Model())
    monkeypatch.setattr(measure, "reference_logprobs", logprobs)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # of all that tests have imported
    monkeypatch.setattr(pipeline, "quantize", made.quantize)
    monkeypatch.setattr(in_memory, "quantize_in_memory", made.quantize_in_memory)
    return made


def run(model: Path, output: Path, text: Path, *paper: str, **changed: Any) -> Ablation:
    settings = {"base": BASE, "paper": paper, "texts": [text], **SETTINGS, **changed}
    return ablate(model, output, [text], **settings)

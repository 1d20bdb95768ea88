"""One-sided outliers in a LayerNorm model, as OPT and BLOOM have them, without changing it.

A channel k of a norm's output becomes c (X_k + d): gamma_k and beta_k are multiplied by c, c d is
added to beta_k; the readers' columns are divided by c, and their biases lose W_k d. The function is
the same; a step for the whole tensor now serves a few huge channels, and codes about 0 waste the
side that these never take.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergequant.model.architectures import find
from mergequant.model.reader import Reader

SHARE = 0.03  # of the channels
FACTORS = (10.0, 30.0)  # c
SHIFTS = (2.0, 4.0)  # d, in standard deviations of a LayerNorm's output


def with_one_sided_outliers(source: Path, target: Path, seed: int = 0) -> Path:
    """Copy the model in `source`, one file of float32, to `target` with outliers in each norm."""
    reader = Reader(source)
    architecture = find(reader.config["model_type"])
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(source / "model.safetensors")
    for number in range(int(reader.config["num_hidden_layers"])):
        prefix = architecture.block.format(block=number)
        for readers in architecture.readers():
            if readers.norm is not None:
                names = [f"{prefix}.{linear.name}" for linear in readers.linears]
                _stretch(tensors, f"{prefix}.{readers.norm.name}", names, generator)
    shutil.copytree(source, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "outliers.json").write_text(json.dumps({"share": SHARE, "factors": FACTORS}))
    return target


def _stretch(
    tensors: dict[str, Tensor], norm: str, linears: list[str], generator: torch.Generator
) -> None:
    weight, bias = tensors[f"{norm}.weight"], tensors[f"{norm}.bias"]
    count = max(1, round(SHARE * len(weight)))
    channels = torch.randperm(len(weight), generator=generator)[:count]
    factor = torch.empty(count).uniform_(*FACTORS, generator=generator)
    sign = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    deviations = torch.empty(count).uniform_(*SHIFTS, generator=generator) * sign
    shift = deviations * weight[channels].abs()
    weight[channels] *= factor
    bias[channels] = (bias[channels] + shift) * factor
    for linear in linears:
        columns = tensors[f"{linear}.weight"][:, channels]
        tensors[f"{linear}.bias"] -= columns @ shift
        tensors[f"{linear}.weight"][:, channels] = columns / factor

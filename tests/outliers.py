"""Structured outliers, as large models have them, put into a small one without changing it.

In each norm 2% of the channels are multiplied by 10 to 30 and the readers' columns divided by as
much: the function is the same, and every token now has the same few huge channels.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mergequant.model.architectures import find
from mergequant.model.reader import Reader

SHARE = 0.02
FACTORS = (10.0, 30.0)


def with_outliers(source: Path, target: Path, seed: int = 0) -> Path:
    """Copy the model in `source` to `target`, rescaled."""
    reader = Reader(source)
    architecture = find(reader.config["model_type"])
    shutil.copytree(source, target)
    for path in target.iterdir():
        path.chmod(0o644)
    generator = torch.Generator().manual_seed(seed)
    file = target / "model.safetensors"
    tensors = load_file(file)
    for number in range(reader.config["num_hidden_layers"]):
        prefix = architecture.block.format(block=number)
        for readers in architecture.readers():
            if readers.norm is None:
                continue
            norm = tensors[f"{prefix}.{readers.norm.name}.weight"]
            count = max(1, round(SHARE * len(norm)))
            channels = torch.randperm(len(norm), generator=generator)[:count]
            factor = torch.empty(count).uniform_(*FACTORS, generator=generator).to(norm.dtype)
            norm[channels] *= factor
            for linear in readers.linears:
                tensors[f"{prefix}.{linear.name}.weight"][:, channels] /= factor
    save_file(tensors, file, metadata={"format": "pt"})
    return target

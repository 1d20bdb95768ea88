"""Sizes of channels and what reconstruction makes of them, for its tests."""

import torch
from torch import Tensor

from mergequant.methods.reconstruct import Reconstruction, reconstruct

BITS = 4
OFFSET_ROUNDING = 2.0**-26  # of a float32 below 1/2


def make(size: Tensor, alpha: float, **options: object) -> Reconstruction:
    """Reconstruct with sizes alone: steps and importance of no interest."""
    ones = torch.ones_like(size, dtype=torch.float64)
    return reconstruct(ones, size, ones, alpha, **{"mode": "pad", "tile": 1, **options})


def sizes(n: int, seed: int, spread: float = 1.0) -> Tensor:
    """Long-tailed and correlated, so that large channels stand together as in real layers."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n + 1, generator=generator, dtype=torch.float64)
    return (spread * (noise[1:] + 0.7 * noise[:-1])).exp()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

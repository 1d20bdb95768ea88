"""Equalization: what an input's channels are divided by, and its weight's columns multiplied by.

With one step a token for all channels, and one step an output for all of a weight's columns, both
mixed by a rotation, the squared error of the product is proportional to

    (sum over k of E[x_k^2] / s_k^2) * (sum over k of |W_k|^2 s_k^2)

for the input's rounding and for the weight's alike. By Cauchy and Schwarz it is least where
s_k^2 = sqrt(E[x_k^2]) / |W_k|, which balances the two as cross-layer equalization (Nagel et al.,
2019) and SmoothQuant (Xiao et al., 2023) do.
"""

import torch
from torch import Tensor

_ROWS_AT_ONCE = 512  # in float64
_LARGEST_RATIO = 1024.0  # of a scale over the median: 16-bit formats hold what is scaled by it


def relative_energy(x: Tensor) -> Tensor:
    """Sum over tokens of each channel's share of the token's square: float64 [K].

    A token's step is proportional to its size, so that what counts of a channel is its share.

    Args:
        x: [..., K].
    """
    total = torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device)
    for rows in torch.split(x.reshape(-1, x.shape[-1]), _ROWS_AT_ONCE):
        squares = rows.to(torch.float64).square()
        total += (squares / squares.sum(dim=-1, keepdim=True).clamp(min=1e-30)).sum(dim=0)
    return total


def channel_scales(energy: Tensor, weight_energy: Tensor) -> Tensor:
    """s of each channel: float64 [K], so that x keeps its mean square; 1 where nothing is known.

    Args:
        energy: [K], proportional to E[x_k^2].
        weight_energy: [K], |W_k|^2.
    """
    known = (energy > 0) & (weight_energy > 0)
    if not bool(known.any()):
        return torch.ones_like(energy, dtype=torch.float64)
    x, w = (part.to(torch.float64).clamp(min=1e-300) for part in (energy, weight_energy))
    scale = (x / w) ** 0.25
    median = scale[known].median()
    scale = scale.clamp(median / _LARGEST_RATIO, median * _LARGEST_RATIO)
    size = ((x / scale.square())[known].sum() / x[known].sum()).sqrt()
    return torch.where(known, scale * size, 1.0)

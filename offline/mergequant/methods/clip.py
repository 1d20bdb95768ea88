"""Adaptive clipping (paper 4.2, Eq. 7): a ratio a channel, or one a layer.

Eq. 7 adds the error of the quantized activation to that of the migrated weight. The two have
different units, so each is carried to the layer's output: the activation's error in channel k is
weighted by the energy of W's column k, the weight's by the energy of the channel's codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.token_quant.reference import token_codes
from mergequant_vllm.rounding import largest_code, round_to_codes

_ROUNDS = 2  # weight steps and clip ratios depend on each other; a third round changes nothing


def clip_grid(lowest: float, points: int) -> Tensor:
    """Ratios to try, ascending, ending at 1: float64 [points]."""
    return torch.linspace(lowest, 1.0, points, dtype=torch.float64)


@dataclass
class ChannelClipStatistics:
    """What a channel's clip ratio is chosen by; batches add up.

    Attributes:
        error: float64 [G, n], sum over tokens of (X - s * code)^2 at each of G ratios.
        energy: float64 [G, n], sum over tokens of code^2.
    """

    error: Tensor
    energy: Tensor

    @classmethod
    def empty(cls, points: int, channels: int, device: torch.device) -> "ChannelClipStatistics":
        """Nothing seen yet."""
        zeros = torch.zeros(2, points, channels, dtype=torch.float64, device=device)
        return cls(error=zeros[0], energy=zeros[1])

    def add(self, x: Tensor, largest: Tensor, grid: Tensor, bits: int) -> None:
        """Count tokens `x` [t, n]; `largest` [n] is max |X| over all tokens."""
        full_step = largest.to(x.dtype) / largest_code(bits)
        alive = full_step > 0
        for index, ratio in enumerate(grid.tolist()):
            step = torch.where(alive, full_step * ratio, 1.0)
            codes = round_to_codes(x / step, bits)
            self.error[index] += (x - codes * step).square().sum(dim=0, dtype=torch.float64)
            self.energy[index] += codes.square().sum(dim=0, dtype=torch.float64)


def choose_channel_clips(
    statistics: ChannelClipStatistics,
    weight: Tensor,
    largest: Tensor,
    grid: Tensor,
    bits: int,
    weight_bits: int = 4,
) -> Tensor:
    """The ratio of each channel that minimises Eq. 7 at the layer's output.

    Args:
        weight: [out, n], the space's readers stacked, not migrated.
        largest: [n], max |X|.
        grid: [G], ratios tried.
        bits: width of an activation code.
        weight_bits: width of a weight code.

    Returns:
        float64 [n].
    """
    grid = grid.to(statistics.error)
    weight = weight.to(torch.float64)
    full = weight * (largest.to(torch.float64) / largest_code(bits))
    activation_error = statistics.error * weight.square().sum(dim=0)
    clip = torch.ones_like(largest, dtype=torch.float64)
    for _ in range(_ROUNDS):
        row_step = (full * clip).abs().amax(dim=1, keepdim=True) / largest_code(weight_bits)
        row_step = torch.where(row_step > 0, row_step, 1.0)
        loss = activation_error.clone()
        for index, ratio in enumerate(grid.tolist()):
            column = full * ratio
            rounded = round_to_codes(column / row_step, weight_bits) * row_step
            loss[index] += (column - rounded).square().sum(dim=0) * statistics.energy[index]
        clip = grid[loss.argmin(dim=0)]
    return clip


def token_clip_losses(x: Tensor, weights: Tensor, grid: Tensor, bits: int) -> Tensor:
    """Output error of per-token quantization at each ratio, for one batch of tokens.

    Args:
        x: [t, n], the linear's input.
        weights: [out, n], the space's readers stacked.
        grid: [G].

    Returns:
        float64 [G], ||(X - step * codes) W^T||^2.
    """
    losses = []
    for ratio in grid.tolist():
        codes, step, _ = token_codes(x, x.new_tensor([ratio]), bits, CodeLayout.FLOAT32)
        error = (x - codes * step) @ weights.T
        losses.append(error.square().sum(dtype=torch.float64))
    return torch.stack(losses)

"""Adaptive clipping (paper 4.2, Eq. 7): a ratio a channel, or one a layer.

Eq. 7 adds the error of the quantized activation to that of the migrated weight. The two have
different units, so each is carried to the layer's output: the activation's error in channel k is
weighted by the energy of W's column k, the weight's by the energy of the channel's codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.token_quant.reference import token_codes
from mergequant_vllm.rounding import largest_code, round_to_codes, round_to_codes_

# A per-token step has one ratio for the whole linear, which so many tokens settle; one in
# `_SCREENING` of them screens the ratios, and `_SCREENED` are tried on all of them.
_TOKENS, _SCREENING, _SCREENED = 4096, 8, 3
_ROUNDS = 2  # weight steps and clip ratios depend on each other; a third round changes nothing


def clip_grid(lowest: float, points: int) -> Tensor:
    """Ratios to try, ascending, ending at 1: float64 [points]."""
    return torch.linspace(lowest, 1.0, points, dtype=torch.float64)


@dataclass(frozen=True)
class ChannelRange:
    """What a channel's activations span, before any of it is clipped.

    Attributes:
        extent: float32 [n]: max |X| where codes are symmetric, max X - min X with zero points.
        levels: how many steps make that up: Q_b, or 2^b - 1.
        middle: float32 [n], (max X + min X) / 2; None where codes are symmetric.
    """

    extent: Tensor
    levels: int
    middle: Tensor | None = None

    @classmethod
    def symmetric(cls, largest: Tensor, bits: int) -> "ChannelRange":
        """From -`largest` to `largest`, each max |X|: float32 [n]."""
        return cls(largest, largest_code(bits))

    @classmethod
    def between(cls, lowest: Tensor, highest: Tensor, bits: int) -> "ChannelRange":
        """From `lowest` to `highest`, min X and max X: float32 [n]; all 2^b codes are used."""
        return cls(highest - lowest, 2**bits - 1, (highest + lowest) / 2)

    def shift(self, step: Tensor) -> Tensor | None:
        """What the code 0 stands for, in X's units: [n]; None where codes are symmetric.

        Codes are one more below 0 than above it, so it lies half a step above the middle; a channel
        that spans nothing has its one value there.
        """
        if self.middle is None:
            return None
        middle = self.middle.to(step.dtype)
        return torch.where(self.extent > 0, middle + step / 2, middle)


@dataclass
class ChannelClipStatistics:
    """What a channel's clip ratio is chosen by; batches add up.

    Attributes:
        error: float64 [G, n], sum over tokens of (X - s * code - z)^2 at each of G ratios.
        energy: float64 [G, n], sum over tokens of code^2.
    """

    error: Tensor
    energy: Tensor

    @classmethod
    def empty(cls, points: int, channels: int, device: torch.device) -> "ChannelClipStatistics":
        """Return sums to which no token was added."""
        zeros = torch.zeros(2, points, channels, dtype=torch.float64, device=device)
        return cls(error=zeros[0], energy=zeros[1])

    def add(self, x: Tensor, spans: ChannelRange, grid: Tensor, bits: int) -> None:
        """Count tokens `x` [t, n] of channels that span `spans` over all tokens."""
        full_step = spans.extent.to(x.dtype) / spans.levels
        alive = full_step > 0
        for index, ratio in enumerate(grid.tolist()):
            step = torch.where(alive, full_step * ratio, 1.0)
            shift = spans.shift(step)
            shifted = x if shift is None else x - shift
            codes = round_to_codes_(shifted / step, bits)
            error = (codes * step).sub_(shifted).square_()
            self.error[index] += error.sum(dim=0, dtype=torch.float64)
            self.energy[index] += codes.square_().sum(dim=0, dtype=torch.float64)


def choose_channel_clips(
    statistics: ChannelClipStatistics,
    weight: Tensor,
    spans: ChannelRange,
    grid: Tensor,
    weight_bits: int = 4,
) -> Tensor:
    """The ratio of each channel that minimises Eq. 7 at the layer's output.

    Args:
        weight: [out, n], the space's readers stacked, not migrated.
        spans: what each channel spans.
        grid: [G], ratios tried.
        weight_bits: width of a weight code.

    Returns:
        float64 [n].
    """
    grid = grid.to(statistics.error)
    weight = weight.to(torch.float64)
    full = weight * (spans.extent.to(torch.float64) / spans.levels)
    activation_error = statistics.error * weight.square().sum(dim=0)
    clip = torch.ones_like(spans.extent, dtype=torch.float64)
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


def choose_token_clip(
    inputs: Sequence[Tensor],
    weights: Tensor,
    grid: Tensor,
    bits: int,
    *,
    zero_points: bool = False,
) -> float:
    """The ratio of per-token steps that leaves the least error at the linears' output.

    Args:
        inputs: [t, n] each, the linears' input, in batches; tokens at even distances are looked at.
        weights: [out, n], the space's readers stacked.
        grid: [G], ratios tried.
        bits: width of an activation code.
        zero_points: a token has a zero point too.
    """

    apart = max(1, sum(len(x) for x in inputs) // _TOKENS)

    def losses(stride: int, ratios: Tensor) -> Tensor:
        parts = (
            token_clip_losses(x[::stride], weights, ratios, bits, zero_points=zero_points)
            for x in inputs
        )
        return torch.stack(list(parts)).sum(dim=0).cpu()

    best = losses(apart * _SCREENING, grid).topk(min(_SCREENED, len(grid)), largest=False).indices
    left = grid[best.sort().values]
    return float(left[losses(apart, left).argmin()])


def token_clip_losses(
    x: Tensor, weights: Tensor, grid: Tensor, bits: int, *, zero_points: bool = False
) -> Tensor:
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
        clip = x.new_tensor([ratio])
        codes, step, zero = token_codes(x, clip, bits, CodeLayout.FLOAT32, zero_points=zero_points)
        error = (x - (codes if zero is None else codes - zero) * step) @ weights.T
        losses.append(error.square().sum(dtype=torch.float64))
    return torch.stack(losses)

"""How the linears of a space read their input from now on, whichever way it was calibrated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mergequant.errors import InputError
from mergequant.methods.clip import (
    ChannelClipStatistics,
    ChannelRange,
    choose_channel_clips,
    clip_grid,
)
from mergequant.model.block import Block


@dataclass(frozen=True)
class ClipSearch:
    """Ratios tried: `points` of them, evenly spaced from `lowest` to 1."""

    lowest: float
    points: int

    def grid(self) -> Tensor:
        """float64 [points], ascending."""
        return clip_grid(self.lowest, self.points)

    def of_channels(
        self,
        inputs: Sequence[Tensor],
        weights: Tensor,
        spans: ChannelRange,
        bits: int,
        weight_bits: int,
    ) -> Tensor:
        """The ratio of each channel that minimises Eq. 7: float64 [n].

        Args:
            inputs: [tokens, n] each.
            weights: [out, n], of all readers.
            spans: what the channels span.
            bits: width of an activation code; `weight_bits`: of a weight's.
        """
        grid = self.grid()
        sums = ChannelClipStatistics.empty(len(grid), len(spans.extent), spans.extent.device)
        for x in inputs:
            sums.add(x, spans, grid, bits)
        return choose_channel_clips(sums, weights, spans, grid, weight_bits)


class CalibratedInput(Protocol):
    """What the quantizer asks of an input whose steps are known."""

    @property
    def is_served(self) -> bool:
        """Whether a server can read its input so; False for baselines that no checkpoint holds."""

    @property
    def report(self) -> Mapping[str, Any]:
        """Fields of the report that the linears share."""

    @property
    def norm_tensors(self) -> Mapping[str, Tensor]:
        """The folded norm as it is to be stored, by name within the block; empty if dynamic."""

    def dequantized(self, x: Tensor) -> Tensor:
        """Input [..., n] of a linear to what its integer product stands for: [..., K]."""

    def unrounded(self, x: Tensor) -> Tensor:
        """The same without its rounding, and not clamped: what the codes are to stand for."""

    def relaxed(self, x: Tensor) -> Tensor:
        """The same without its rounding: clamped, differentiable."""

    def folded_weight(self, weight: Tensor) -> Tensor:
        """W as its codes are chosen, steps and columns in it: [out, n] to [out, K]."""

    def output_offset(self, weight: Tensor) -> Tensor | None:
        """The constant that zero points take away from W x: [out, n] to [out]; None without."""

    def stored(self) -> dict[str, Tensor]:
        """Tensors of the input that each of the linears stores, by suffix."""


class InputPlan(Protocol):
    """How an input is to be calibrated: everything is decided but what the activations decide."""

    @property
    def kind(self) -> str:
        """`static` or `dynamic`, for the report."""

    @property
    def bits(self) -> int:
        """Width of an activation code."""

    def calibrate(
        self, block: Block, linears: Sequence[str], batches: Sequence[Tensor]
    ) -> tuple[CalibratedInput, list[Tensor]]:
        """Choose the steps of the input that `linears` of `block` share.

        Args:
            linears: their names within the block.
            batches: hidden states to calibrate on.

        Returns:
            the input, and what the linears read of the first batches, [tokens, n] each, where the
            calibration has it.
        """


def clip_report(clip: Tensor) -> dict[str, float]:
    """What the report says of the clip ratios [n] of channels."""
    limits = {"lowest": clip.min(), "mean": clip.mean(), "highest": clip.max()}
    return {key: round(float(value), 4) for key, value in limits.items()}


def stacked_weights(block: Block, linears: Sequence[str]) -> Tensor:
    """The weights of linears that read one input as one matrix: float32 [out, n]."""
    return torch.cat([block.weight(name) for name in linears])


def refuse_infinite(values: Tensor, name: str) -> None:
    """Raise InputError unless all of what is `name`d, or its statistics, is finite."""
    if not bool(torch.isfinite(values).all()):
        raise InputError(
            f"{name} holds NaN or infinity on the calibration text: the model "
            "overflows in float32; check that its files are whole and that it answers sensibly."
        )

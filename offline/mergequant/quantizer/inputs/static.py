"""A norm-fed input: steps that fold into the norm, zero points, columns (paper 4.1 and 4.2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mergequant.calibration.statistics import ChannelMagnitudes, outlier_ratio
from mergequant.errors import InputError
from mergequant.methods.clip import (
    ChannelRange,
)
from mergequant.methods.migrate import (
    FoldedNorm,
    activation_steps,
    centred,
    fold_norm,
)
from mergequant.methods.reconstruct import (
    Reconstruction,
    as_they_are,
    reconstruct,
    sort_columns,
)
from mergequant.methods.trim import ChannelHistogram, trim_ends
from mergequant.model.architecture import Norm
from mergequant.model.block import Block
from mergequant.quantizer.inputs.record import (
    CalibratedInput,
    ClipSearch,
    clip_report,
    refuse_infinite,
    stacked_weights,
)
from mergequant.quantizer.inputs.static_input import StaticInput


@dataclass(frozen=True)
class ColumnsPlan:
    """Which columns the linears behind a norm have.

    Attributes:
        mode: `none`: the channels; `prune` and `pad`: see `methods.reconstruct`.
        count: K.
        alpha: of Eq. 6.
        split_by: what Eq. 6 measures: the activation `step`, or the `folded` weight column.
        staggered: copies of a channel round at different offsets.
        sorted: by falling size, for weight steps along K.
    """

    mode: Literal["none", "prune", "pad"]
    count: int
    alpha: float
    split_by: Literal["step", "folded"]
    staggered: bool
    sorted: bool


@dataclass(frozen=True)
class StaticInputPlan:
    """How a norm-fed input is to be calibrated.

    Attributes:
        norm: whose multiplier will carry 1/s.
        bits: width of an activation code.
        zero_points: channels have zero points.
        clip: None: nothing is clipped.
        columns: None: the channels as they are, and nothing is gathered.
        weight_bits: width of the readers' weight codes, for the clip search.
    """

    norm: Norm
    bits: int
    zero_points: bool
    clip: ClipSearch | None
    columns: ColumnsPlan | None
    weight_bits: int
    kind: str = "static"

    def calibrate(
        self, block: Block, linears: Sequence[str], batches: Sequence[Tensor]
    ) -> tuple[CalibratedInput, list[Tensor]]:
        """Choose a step for each channel and fold it into the norm, within the block too."""
        inputs = block.inputs_of(linears[0], batches)
        weights = stacked_weights(block, linears)
        length = batches[0].shape[1]
        calibration = calibrate_channels(self, block, linears[0], inputs, weights, length)
        tensors = _fold_into(block, self.norm.name, calibration.folded)
        columns = None
        if self.columns is not None:
            columns = columns_of(calibration, weights, self.columns)
        clips = calibration.clip
        report = {
            "clip": clip_report(clips),
            "outliers": _outliers_report(calibration, columns),
            "reconstruction": _reconstruction_report(columns, len(clips)),
        }
        # What was observed is not yet divided by the steps, which no division can make up for.
        return static_input(calibration, columns, self.bits, report, tensors), []

    def span(
        self, magnitudes: ChannelMagnitudes, inputs: Sequence[Tensor], length: int
    ) -> ChannelRange:
        """What the channels span.

        Args:
            inputs: [tokens, n] each, windows of `length` tokens; for plans that look at windows.
        """
        return _span(self, magnitudes.lowest, magnitudes.highest)

    def unclipped_steps(self, spans: ChannelRange, weights: Tensor) -> Tensor:
        """Steps with which nothing is clipped: float64 [n].

        Args:
            spans: what the channels span.
            weights: [out, n], of all readers, for plans whose steps depend on them.
        """
        return activation_steps(spans.extent, torch.ones_like(spans.extent), spans.levels)


def _fold_into(block: Block, norm: str, folded: FoldedNorm) -> dict[str, Tensor]:
    """Give a norm of the block its folded parameters; what is to be stored, by name within it."""
    module: Any = block.module.get_submodule(norm)
    stored = {}
    for part, value in (("weight", folded.weight), ("bias", folded.bias)):
        if value is not None:
            name = f"{norm}.{part}"
            stored[name] = value.to(block.source_tensors[name].dtype)
            setattr(module, part, nn.Parameter(stored[name].to(torch.float32), requires_grad=False))
    return stored


@dataclass(frozen=True)
class ChannelCalibration:
    """What calibration says of a norm's output.

    Attributes:
        folded: the norm with 1/s in its multiplier.
        shift: float64 [n], z, what the code 0 stands for; None where codes are symmetric.
        centred: the norm's bias takes z away; else the server adds an offset before it rounds.
        energy: float64 [n], sum of X^2 over the tokens.
        clip: float64 [n], ratios c; with zero points, how much of what was seen the codes span.
        largest: float32 [n], max_t |X_tk|.
    """

    folded: FoldedNorm
    shift: Tensor | None
    energy: Tensor
    clip: Tensor
    largest: Tensor
    centred: bool = False

    def emitted(self, x: Tensor) -> Tensor:
        """What the folded norm emits where the plain one emits x [..., n]: float32 [..., n]."""
        x = x - self.shift.to(x.dtype) if self.centred and self.shift is not None else x
        return x / self.folded.step.to(torch.float32)


def calibrate_channels(
    plan: StaticInputPlan,
    block: Block,
    linear: str,
    inputs: Sequence[Tensor],
    weights: Tensor,
    length: int = 1,
) -> ChannelCalibration:
    """Steps, zero points and clip ratios of a norm's channels; the block is left as it was.

    Args:
        linear: one of the norm's readers.
        inputs: [tokens, n] each, what it reads.
        weights: [out, n], of all of them.
        length: tokens in a window.
    """
    magnitudes = ChannelMagnitudes.of(inputs)
    refuse_infinite(magnitudes.energy, f"The input of {block.name_of(linear)}")
    seen = plan.span(magnitudes, inputs, length)
    spans, clip, step = seen, torch.ones_like(seen.extent, dtype=torch.float64), None
    if plan.clip is not None and plan.zero_points:
        # Ends that were searched need no ratio beside them: searched as well, it stays 1.
        histogram = ChannelHistogram.of(inputs, magnitudes.lowest, magnitudes.highest, plan.bits)
        spans = _span(plan, *trim_ends(histogram, plan.clip.grid(), plan.bits))
        clip = torch.where(seen.extent > 0, spans.extent / seen.extent, clip)
    elif plan.clip is not None:
        clip = plan.clip.of_channels(inputs, weights, spans, plan.bits, plan.weight_bits)
        step = activation_steps(spans.extent, clip, spans.levels)
    if step is None:
        step = plan.unclipped_steps(spans, weights)
    folded, shift = _folded(plan.norm, block, spans, step)
    absorbed = shift is not None and folded.bias is not None
    return ChannelCalibration(folded, shift, magnitudes.energy, clip, magnitudes.largest, absorbed)


def _folded(
    norm: Norm, block: Block, spans: ChannelRange, step: Tensor
) -> tuple[FoldedNorm, Tensor | None]:
    """The norm that divides by `step`, its bias with z in it if it has one; and z [n]."""
    source, one_plus = block.source_tensors, norm.multiplier == "one_plus"
    weight, bias = source[f"{norm.name}.weight"].to(step.device), source.get(f"{norm.name}.bias")
    bias = None if bias is None else bias.to(step.device)
    folded = fold_norm(weight, bias, step, one_plus=one_plus)
    shift = spans.shift(folded.step)
    if shift is None or bias is None:
        return folded, shift
    held, taken = centred(folded, shift)
    coarse = (taken - shift).abs() > folded.step / 4
    if not bool(coarse.any()):
        return held, taken
    # The stored bias, of 8 significant bits, is too coarse for the middle: codes reach further, by
    # what its rounding can be whatever the step.
    lost = 2.0**-8 * (bias.to(torch.float64) - shift).abs()
    wider = torch.where(coarse, folded.step + 2 * lost / spans.levels, folded.step)
    folded = fold_norm(weight, bias, wider, one_plus=one_plus)
    shift = spans.shift(folded.step)
    assert shift is not None
    return centred(folded, shift)


def _span(plan: StaticInputPlan, lowest: Tensor, highest: Tensor) -> ChannelRange:
    """What codes are to reach from `lowest` to `highest`: [n] each."""
    low, high = lowest.to(torch.float32), highest.to(torch.float32)
    if plan.zero_points:
        return ChannelRange.between(low, high, plan.bits)
    return ChannelRange.symmetric(torch.maximum(high, -low), plan.bits)


def static_input(
    calibration: ChannelCalibration,
    columns: Reconstruction | None,
    bits: int,
    report: Mapping[str, Any],
    norm_tensors: Mapping[str, Tensor],
) -> StaticInput:
    """The input behind a norm that was calibrated; zero points become offsets of its columns.

    Not so where the norm's bias has taken them in.
    """
    step, shift = calibration.folded.step, calibration.shift
    offset = None if columns is None else columns.offset
    if shift is not None and not calibration.centred:
        # As it is stored: W z is then the constant of what the server really subtracts.
        zero = (-shift / step).to(torch.float32)
        shift = -zero.to(torch.float64) * step
        per_column = zero if columns is None else zero[columns.index]
        offset = per_column if offset is None else per_column + offset
    return StaticInput(bits, step, shift, columns, offset, report, norm_tensors)


def columns_of(
    calibration: ChannelCalibration, weights: Tensor, plan: ColumnsPlan
) -> Reconstruction:
    """The columns of the linears behind a norm: K = `plan.count` of them (paper 4.2, Eq. 6).

    Args:
        weights: [out, n], the space's readers stacked, not migrated.

    Raises:
        InputError: `prune` does not have as many channels to drop.
    """
    step = calibration.folded.step
    folded = step * weights.to(torch.float64).norm(dim=0)
    if plan.mode == "none":
        columns = as_they_are(len(step), plan.count, step.device)
    else:
        columns = _reconstructed(calibration, folded, plan)
    return sort_columns(columns, folded) if plan.sorted else columns


def _reconstructed(
    calibration: ChannelCalibration, folded: Tensor, plan: ColumnsPlan
) -> Reconstruction:
    mode: Literal["prune", "pad"] = "pad" if plan.mode == "pad" else "prune"
    step = calibration.folded.step
    try:
        columns = reconstruct(
            step,
            step if plan.split_by == "step" else folded,
            calibration.energy,
            plan.alpha,
            mode=mode,
            tile=plan.count,
            most_columns=plan.count if mode == "pad" else None,
            staggered=plan.staggered,
        )
    except ValueError as error:
        raise InputError(f"--reconstruction {mode} --alpha {plan.alpha:g}: {error}.") from error
    missing = plan.count - len(columns.index)
    offset = columns.offset
    if plan.staggered and offset is None:
        offset = torch.zeros(len(columns.index), dtype=torch.float32, device=step.device)
    return replace(
        columns,
        index=F.pad(columns.index, (0, missing)),
        share=F.pad(columns.share, (0, missing)),
        offset=None if offset is None else F.pad(offset, (0, missing)),
        padding=columns.padding + missing,
    )


def _outliers_report(
    calibration: ChannelCalibration, columns: Reconstruction | None
) -> dict[str, float]:
    """Outlier ratios of the channels, and of the columns with the shares that they take."""
    sizes = {"channels": calibration.largest}
    if columns is not None:
        sizes["columns"] = calibration.largest[columns.index] * columns.share
    ratios = {name: outlier_ratio(x) for name, x in sizes.items()}
    return {name: round(ratio, 2) for name, ratio in ratios.items() if ratio is not None}


def _reconstruction_report(columns: Reconstruction | None, channels: int) -> dict[str, Any] | None:
    if columns is None:
        return None
    return {
        "columns": len(columns.index),
        "growth": len(columns.index) / channels - 1,
        "strong": columns.strong,
        "copies": columns.copies,
        "left_out": columns.left_out,
        "dropped": len(columns.dropped),
        "padding": columns.padding,
    }

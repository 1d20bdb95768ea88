"""A norm-fed input: steps that fold into the norm, zero points, columns (paper 4.1 and 4.2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
    migrate_weight,
)
from mergequant.methods.reconstruct import (
    Reconstruction,
    as_they_are,
    fold_columns,
    reconstruct,
    sort_columns,
)
from mergequant.methods.trim import ChannelHistogram, trim_ends
from mergequant.model.architecture import Norm
from mergequant.model.block import Block
from mergequant.quantizer.inputs.record import (
    CalibratedInput,
    ClipSearch,
    refuse_infinite,
    stacked_weights,
)
from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.norm_round.reference import static_codes
from mergequant_vllm.rounding import largest_code, smallest_code


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
        inputs: list[Tensor] = []
        block.observe(linears[0], batches, inputs.append)
        weights = stacked_weights(block, linears)
        length = batches[0].shape[1]
        calibration = calibrate_channels(self, block, linears[0], inputs, weights, length)
        tensors = _fold_into(block, self.norm.name, calibration.folded)
        columns = None
        if self.columns is not None:
            columns = columns_of(calibration, weights, self.columns)
        clips = calibration.clip
        limits = {"lowest": clips.min(), "mean": clips.mean(), "highest": clips.max()}
        report = {
            "clip": {key: round(float(value), 4) for key, value in limits.items()},
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
    magnitudes = ChannelMagnitudes()
    for x in inputs:
        magnitudes.add(x)
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
    lost = (taken - shift).abs()
    if not bool((lost > folded.step / 4).any()):
        return held, taken
    # The stored bias is too coarse for the middle: codes must reach as much further.
    folded = fold_norm(weight, bias, folded.step + 2 * lost / spans.levels, one_plus=one_plus)
    shift = spans.shift(folded.step)
    assert shift is not None
    return centred(folded, shift)


def _span(plan: StaticInputPlan, lowest: Tensor, highest: Tensor) -> ChannelRange:
    """What codes are to reach from `lowest` to `highest`: [n] each."""
    low, high = lowest.to(torch.float32), highest.to(torch.float32)
    if plan.zero_points:
        return ChannelRange.between(low, high, plan.bits)
    return ChannelRange.symmetric(torch.maximum(high, -low), plan.bits)


@dataclass(frozen=True)
class StaticInput:
    """The input of linears whose norm hands out x / step.

    Attributes:
        bits: width of an activation code.
        step: float64 [n], what migrates into the weights.
        shift: float64 [n], what the code 0 stands for, as `offset` or the norm's bias are stored;
            None: 0.
        columns: of the linears; None: the channels as they are.
        offset: float32 [K], added before rounding; None: 0.
        report: fields of the report.
        norm_tensors: the folded norm as it is to be stored, by name within the block.
    """

    bits: int
    step: Tensor
    shift: Tensor | None
    columns: Reconstruction | None
    offset: Tensor | None
    report: Mapping[str, Any]
    norm_tensors: Mapping[str, Tensor]
    is_served: bool = True

    def dequantized(self, x: Tensor) -> Tensor:
        """Codes of x [..., n], whose norm is folded: float32 [..., K]."""
        codes = static_codes(
            x, self.bits, CodeLayout.FLOAT32, index=self._index, offset=self.offset
        )
        return self._without_padding(codes)

    def unrounded(self, x: Tensor) -> Tensor:
        """Codes of x [..., n] before they are rounded and clamped: float32 [..., K]."""
        columns = x if self._index is None else x.index_select(-1, self._index)
        columns = columns if self.offset is None else columns + self.offset
        return self._without_padding(columns)

    def relaxed(self, x: Tensor) -> Tensor:
        """Codes of x [..., n] before they are rounded, clamped: float32 [..., K]."""
        return self.unrounded(x).clamp(smallest_code(self.bits), largest_code(self.bits))

    def folded_weight(self, weight: Tensor) -> Tensor:
        """W times the steps, columns reconstructed: [out, n] to [out, K]."""
        if self.columns is None:
            return migrate_weight(weight, self.step)
        return fold_columns(weight, self.step, self.columns)

    def output_offset(self, weight: Tensor) -> Tensor | None:
        """W z: [out, n] to float32 [out]; None without zero points."""
        if self.shift is None:
            return None
        return (weight.to(torch.float64) @ self.shift).to(torch.float32)

    def stored(self) -> dict[str, Tensor]:
        """`input_index` and `input_offset` where there are any."""
        tensors = {}
        if self._index is not None:
            tensors["input_index"] = self._index.cpu()
        if self.offset is not None:
            tensors["input_offset"] = self.offset.cpu().clone()
        return tensors

    @cached_property
    def _index(self) -> Tensor | None:
        return None if self.columns is None else self.columns.index.to(torch.int32)

    @cached_property
    def _real(self) -> Tensor | None:
        """1 for each column but those of padding, float32 [K]; None where there are none."""
        if self.columns is None or self.columns.padding == 0:
            return None
        return (self.columns.share != 0).to(torch.float32)

    def _without_padding(self, codes: Tensor) -> Tensor:
        """Padding reads channel 0 and must learn nothing from it: its weight stays 0."""
        return codes if self._real is None else codes * self._real


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

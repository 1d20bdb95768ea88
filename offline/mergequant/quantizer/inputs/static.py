"""A norm-fed stage's input: steps that fold into the norm, and columns (paper 4.1 and 4.2)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mergequant.calibration.statistics import ChannelMagnitudes
from mergequant.errors import InputError
from mergequant.methods.clip import ChannelClipStatistics, choose_channel_clips, clip_grid
from mergequant.methods.migrate import (
    FoldedNorm,
    activation_steps,
    fold_norm,
    smooth_steps,
    tensor_steps,
)
from mergequant.methods.reconstruct import Reconstruction, reconstruct
from mergequant.model.architecture import Norm, Stage
from mergequant.model.decoder import Block
from mergequant.options import Options
from mergequant.quantizer.inputs.record import StageInput, refuse_infinite, stacked_weights
from mergequant_vllm.format import LinearFormat
from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.norm_round.reference import static_codes
from mergequant_vllm.rounding import largest_code, smallest_code


@dataclass(frozen=True)
class ChannelCalibration:
    """What calibration found of a norm's output.

    Attributes:
        folded: the norm with 1/s in its multiplier.
        largest: float32 [n], max |X|.
        energy: float64 [n], sum of X^2 over the tokens.
        clip: float64 [n], ratios c.
    """

    folded: FoldedNorm
    largest: Tensor
    energy: Tensor
    clip: Tensor


def static_input(
    block: Block,
    stage: Stage,
    norm: Norm,
    batches: list[Tensor],
    options: Options,
    form: LinearFormat,
) -> StageInput:
    """Choose a step for each channel and fold it into the norm, within the block too.

    Args:
        batches: hidden states to calibrate on.
        form: how the stage's linears are stored.
    """
    found = calibrate_channels(block, stage, norm, batches, options)
    name = f"{norm.name}.weight"
    module: Any = block.module.get_submodule(norm.name)
    module.weight = nn.Parameter(found.folded.weight.to(torch.float32), requires_grad=False)
    shape = None
    if form.columns is not None:
        weights = stacked_weights(block, stage)
        shape = columns_of(found, weights, options, form.columns)
    clips = {"lowest": found.clip.min(), "mean": found.clip.mean(), "highest": found.clip.max()}
    return reading(
        found.folded.step,
        shape,
        options.static_bits,
        tensors={name: found.folded.weight.to(block.stored[name].dtype)},
        report={
            "clip": {key: round(float(value), 4) for key, value in clips.items()},
            "reconstruction": _reconstruction_report(shape, len(found.largest)),
        },
    )


def calibrate_channels(
    block: Block, stage: Stage, norm: Norm, batches: list[Tensor], options: Options
) -> ChannelCalibration:
    """Steps and clip ratios of a norm's channels; the block is left as it was."""
    first = stage.linears[0].name
    seen = ChannelMagnitudes()
    block.observe(first, batches, seen.add)
    refuse_infinite(seen.energy, f"The input of {block.name_of(first)}")
    clip = _channel_clips(block, stage, batches, seen.largest, options)
    folded = fold_norm(
        block.stored[f"{norm.name}.weight"].to(clip.device),
        None,
        _steps(block, stage, seen.largest, clip, options),
        one_plus=norm.multiplier == "one_plus",
    )
    return ChannelCalibration(folded, seen.largest, seen.energy, clip)


def _steps(block: Block, stage: Stage, largest: Tensor, clip: Tensor, options: Options) -> Tensor:
    bits = options.static_bits
    if options.activation_step == "channel":
        return activation_steps(largest, clip, bits)
    if options.activation_step == "tensor":
        return tensor_steps(largest, bits)
    return smooth_steps(largest, stacked_weights(block, stage).abs().amax(dim=0), bits)


def _channel_clips(
    block: Block, stage: Stage, batches: list[Tensor], largest: Tensor, options: Options
) -> Tensor:
    if options.clipping == "none":
        return torch.ones_like(largest, dtype=torch.float64)
    grid = clip_grid(options.lowest_clip, options.clip_points)
    bits = options.static_bits
    seen = ChannelClipStatistics.empty(len(grid), len(largest), largest.device)
    block.observe(stage.linears[0].name, batches, lambda x: seen.add(x, largest, grid, bits))
    weights = stacked_weights(block, stage)
    return choose_channel_clips(seen, weights, largest, grid, bits, options.weight_bits)


def reading(
    step: Tensor,
    shape: Reconstruction | None,
    bits: int,
    tensors: dict[str, Tensor],
    report: dict[str, Any],
) -> StageInput:
    """The input of linears whose norm hands out x / step."""
    index = None if shape is None else shape.index.to(torch.int32)
    offset = None if shape is None else shape.offset
    # Padding reads channel 0 and must learn nothing from it: its weight stays 0.
    real = None if shape is None else (shape.share != 0).to(torch.float32)

    def masked(codes: Tensor) -> Tensor:
        return codes if real is None else codes * real

    def dequantized(x: Tensor) -> Tensor:
        return masked(static_codes(x, bits, CodeLayout.FLOAT32, index=index, offset=offset))

    def relaxed(x: Tensor) -> Tensor:
        columns = x if index is None else x.index_select(-1, index)
        columns = columns if offset is None else columns + offset
        return masked(columns.clamp(smallest_code(bits), largest_code(bits)))

    return StageInput(dequantized, relaxed, report, step, shape, tensors=tensors)


def columns_of(
    found: ChannelCalibration, weights: Tensor, options: Options, columns: int
) -> Reconstruction:
    """The columns of the linears behind a norm, as many in every block (paper 4.2, Eq. 6).

    Args:
        weights: [out, n], the space's readers stacked, not migrated.
        columns: K.
    """
    assert not isinstance(options.alpha, str) and options.reconstruction != "auto"  # see `pilot`
    mode: Literal["prune", "pad"] = "pad" if options.reconstruction == "pad" else "prune"
    step = found.folded.step
    size = step
    if options.split_by == "folded":
        size = step * weights.to(torch.float64).norm(dim=0)
    try:
        shape = reconstruct(
            step,
            size,
            found.energy,
            options.alpha,
            mode=mode,
            tile=columns,
            most_columns=columns if mode == "pad" else None,
            staggered=options.staggered,
        )
    except ValueError as error:
        raise InputError(f"--reconstruction {mode} --alpha {options.alpha:g}: {error}.") from error
    missing = columns - len(shape.index)
    offset = shape.offset
    if options.staggered and offset is None:
        offset = torch.zeros(len(shape.index), dtype=torch.float32, device=step.device)
    return Reconstruction(
        index=F.pad(shape.index, (0, missing)),
        share=F.pad(shape.share, (0, missing)),
        offset=None if offset is None else F.pad(offset, (0, missing)),
        strong=shape.strong,
        copies=shape.copies,
        left_out=shape.left_out,
        dropped=shape.dropped,
        padding=shape.padding + missing,
    )


def _reconstruction_report(found: Reconstruction | None, channels: int) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "columns": len(found.index),
        "growth": len(found.index) / channels - 1,
        "strong": found.strong,
        "copies": found.copies,
        "left_out": found.left_out,
        "dropped": len(found.dropped),
        "padding": found.padding,
    }

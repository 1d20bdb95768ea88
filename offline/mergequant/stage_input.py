"""How a stage's linears will read their input: clip ratios, steps, reconstruction, folded norm."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mergequant.architecture import Norm, Stage
from mergequant.contract import reconstructed_columns
from mergequant.decoder import Activations, Block
from mergequant.methods.clip import (
    ChannelClipStatistics,
    choose_channel_clips,
    clip_grid,
    token_clip_losses,
)
from mergequant.methods.migrate import activation_steps, fold_norm
from mergequant.methods.reconstruct import Reconstruction, reconstruct
from mergequant.options import Options
from mergequant.statistics import ChannelMagnitudes
from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.hadamard.reference import rotate
from mergequant_vllm.kernels.norm_round.reference import static_codes
from mergequant_vllm.kernels.token_quant.reference import token_codes


@dataclass(frozen=True)
class StageInput:
    """How a stage's linears read their input from now on.

    Attributes:
        norm: name within the block of the norm that carries 1/s; None if activations are dynamic.
        step: float64 [n], what migrates into the weights; static only.
        reconstruction: columns of the linears, or None; static only.
        clip: float32 [1], ratio of the per-token step; dynamic only.
        hadamard: block of the online rotation, or None; dynamic only.
        dequantized: input [t, n] of a linear to what the integer product sees of it, [t, K].
        tensors: the folded norm as it is to be stored, by name within the block.
        report: for the report, by field.
    """

    norm: str | None
    step: Tensor | None
    reconstruction: Reconstruction | None
    clip: Tensor | None
    hadamard: int | None
    dequantized: Callable[[Tensor], Tensor]
    tensors: dict[str, Tensor]
    report: dict[str, Any]

    def stored(self) -> dict[str, Tensor]:
        """Tensors of the input that every linear of the stage stores, by suffix."""
        if self.clip is not None:
            return {"input_clip": self.clip.cpu().clone()}
        if self.reconstruction is None:
            return {}
        found = {"input_index": self.reconstruction.index.to(torch.int32).cpu()}
        if self.reconstruction.offset is not None:
            found["input_offset"] = self.reconstruction.offset.cpu().clone()
        return found


def read_stage_input(
    block: Block, stage: Stage, activations: Activations, options: Options
) -> StageInput:
    """Calibrate the input of `stage`; puts the folded norm into the block."""
    if stage.norm is not None and options.activations == "static":
        return _static_input(block, stage, stage.norm, activations, options)
    return _dynamic_input(block, stage, activations, options)


def _static_input(
    block: Block, stage: Stage, norm: Norm, activations: Activations, options: Options
) -> StageInput:
    """Choose a step for each channel and fold it into the norm (paper 4.1 and 4.2)."""
    first, batches = stage.linears[0].name, activations.batches[: activations.statistics]
    bits = options.static_bits
    seen = ChannelMagnitudes()
    block.observe(first, batches, seen.add)
    clip = _channel_clips(block, stage, batches, seen.largest, options)
    name = f"{norm.name}.weight"
    folded = fold_norm(
        block.stored[name].to(clip.device),
        None,
        activation_steps(seen.largest, clip, bits),
        one_plus=norm.multiplier == "one_plus",
    )
    module: Any = block.module.get_submodule(norm.name)
    module.weight = nn.Parameter(folded.weight.to(torch.float32), requires_grad=False)
    shape = _reconstruction(block, stage, folded.step, seen.energy, options)
    index = None if shape is None else shape.index.to(torch.int32)
    offset = None if shape is None else shape.offset
    # Padding reads channel 0 and must learn nothing from it: its weight stays 0.
    real = None if shape is None else (shape.share != 0).to(torch.float32)

    def dequantized(x: Tensor) -> Tensor:
        codes = static_codes(x, bits, CodeLayout.FLOAT32, index=index, offset=offset)
        return codes if real is None else codes * real

    clips = {"lowest": clip.min(), "mean": clip.mean(), "highest": clip.max()}
    return StageInput(
        norm=norm.name,
        step=folded.step,
        reconstruction=shape,
        clip=None,
        hadamard=None,
        dequantized=dequantized,
        tensors={name: folded.weight.to(block.stored[name].dtype)},
        report={
            "clip": {key: round(float(value), 4) for key, value in clips.items()},
            "reconstruction": _reconstruction_report(shape),
        },
    )


def _reconstruction(
    block: Block, stage: Stage, step: Tensor, energy: Tensor, options: Options
) -> Reconstruction | None:
    """The columns of the stage's linears, as many in every block (paper 4.2, Eq. 6)."""
    if options.reconstruction == "none":
        return None
    mode: Literal["prune", "pad"] = options.reconstruction
    size = step
    if options.split_by == "folded":
        size = step * _stacked_weights(block, stage).to(torch.float64).norm(dim=0)
    columns = reconstructed_columns(options, len(step))
    found = reconstruct(
        step,
        size,
        energy,
        options.alpha,
        mode=mode,
        tile=columns,
        most_columns=columns if mode == "pad" else None,
        staggered=options.staggered,
    )
    missing = columns - len(found.index)
    offset = found.offset
    if options.staggered and offset is None:
        offset = torch.zeros(len(found.index), dtype=torch.float32, device=step.device)
    return Reconstruction(
        index=F.pad(found.index, (0, missing)),
        share=F.pad(found.share, (0, missing)),
        offset=None if offset is None else F.pad(offset, (0, missing)),
        strong=found.strong,
        copies=found.copies,
        left_out=found.left_out,
        dropped=found.dropped,
        padding=found.padding + missing,
    )


def _reconstruction_report(found: Reconstruction | None) -> dict[str, int] | None:
    if found is None:
        return None
    return {
        "columns": len(found.index),
        "strong": found.strong,
        "copies": found.copies,
        "left_out": found.left_out,
        "dropped": len(found.dropped),
        "padding": found.padding,
    }


def _channel_clips(
    block: Block, stage: Stage, batches: list[Tensor], largest: Tensor, options: Options
) -> Tensor:
    if options.clipping == "none":
        return torch.ones_like(largest, dtype=torch.float64)
    grid = clip_grid(options.lowest_clip, options.clip_points)
    bits = options.static_bits
    seen = ChannelClipStatistics.empty(len(grid), len(largest), largest.device)
    block.observe(stage.linears[0].name, batches, lambda x: seen.add(x, largest, grid, bits))
    weights = _stacked_weights(block, stage)
    return choose_channel_clips(seen, weights, largest, grid, bits, options.weight_bits)


def _dynamic_input(
    block: Block, stage: Stage, activations: Activations, options: Options
) -> StageInput:
    """Search one clip ratio for the stage's per-token steps (paper 4.2)."""
    bits, device = options.dynamic_bits, activations.batches[0].device
    # The weights of such a linear were rotated as they were read; its float input is not.
    hadamard = block.hadamard(stage.linears[0].name)

    def rotated(x: Tensor) -> Tensor:
        return x if hadamard is None else rotate(x, hadamard)

    clip = torch.ones(1, dtype=torch.float32, device=device)
    if options.clipping == "adaptive":
        grid = clip_grid(options.lowest_clip, options.clip_points)
        weights = _stacked_weights(block, stage)
        losses = torch.zeros(len(grid), dtype=torch.float64, device=device)
        block.observe(
            stage.linears[0].name,
            activations.batches[: activations.statistics],
            lambda x: losses.add_(token_clip_losses(rotated(x), weights, grid, bits)),
        )
        clip = grid[losses.argmin().cpu()].reshape(1).to(device, torch.float32)

    def dequantized(x: Tensor) -> Tensor:
        codes, step = token_codes(x, clip, bits, CodeLayout.FLOAT32, hadamard=hadamard)
        return codes * step

    return StageInput(
        norm=None,
        step=None,
        reconstruction=None,
        clip=clip,
        hadamard=hadamard,
        dequantized=dequantized,
        tensors={},
        report={"clip": round(float(clip), 4)},
    )


def _stacked_weights(block: Block, stage: Stage) -> Tensor:
    return torch.cat([block.weight(linear.name) for linear in stage.linears])

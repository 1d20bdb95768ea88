"""One stage of a block: statistics -> clipping -> step migration -> codes, for linears that share
an input space."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergequant.architecture import Stage
from mergequant.decoder import Activations, Block
from mergequant.methods.clip import (
    ChannelClipStatistics,
    choose_channel_clips,
    clip_grid,
    token_clip_losses,
)
from mergequant.methods.gptq import (
    InverseHessian,
    NotPositiveDefiniteError,
    gptq,
    invert_hessian,
    output_loss,
    round_to_nearest,
)
from mergequant.methods.migrate import (
    activation_steps,
    fold_norm,
    migrate_weight,
    weight_steps,
)
from mergequant.options import Options
from mergequant.quantized_linear import QuantizedLinear
from mergequant.statistics import Hessian, LargestMagnitude
from mergequant_vllm.format import LinearFormat
from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.norm_round.reference import static_codes
from mergequant_vllm.kernels.token_quant.reference import token_codes
from mergequant_vllm.packing import pack

BITS = 4

logger = logging.getLogger("mergequant")


@dataclass(frozen=True)
class LinearResult:
    """One quantized linear: what to store, by name within the block, and a line of the report."""

    linear: str
    tensors: dict[str, Tensor]
    report: dict[str, Any]
    loss: float


@dataclass(frozen=True)
class StageInput:
    """How a stage's linears read their input from now on.

    Attributes:
        step: float64 [n], what migrates into the weights; None if nothing does.
        clip: float32 [1], ratio of the per-token step; None for static activations.
        dequantized: input [t, n] of a linear to what the integer product sees of it.
        norm: name within the block of the norm that carries 1/s, or None.
        tensors: that norm as it is to be stored, by name within the block.
        clip_report: for the report.
    """

    step: Tensor | None
    clip: Tensor | None
    dequantized: Callable[[Tensor], Tensor]
    norm: str | None
    tensors: dict[str, Tensor]
    clip_report: object


def quantize_stage(
    block: Block, stage: Stage, activations: Activations, options: Options
) -> Iterator[LinearResult]:
    """Quantize a stage's linears and put them into the block, so that later stages see them."""
    began = time.monotonic()
    if stage.norm is not None and options.activations == "static":
        source = _static_input(block, stage, activations, options)
    else:
        source = _dynamic_input(block, stage, activations, options)
    seen = Hessian()
    rounding = options.weights == "rtn"
    used = activations.statistics if rounding else activations.gptq
    batches = activations.batches[:used]
    first = stage.linears[0].name
    block.observe(first, batches, lambda x: seen.add(source.dequantized(x)))
    hessian = seen.get()
    inverse = None if rounding else _inverse(hessian, options, first)
    for number, linear in enumerate(stage.linears):
        result = _quantize_linear(block, linear.name, source, hessian, inverse, options)
        result.report["seconds"] = round(time.monotonic() - began, 3)
        began = time.monotonic()
        if number == 0:
            result.tensors.update(source.tensors)
        yield result


def _static_input(
    block: Block, stage: Stage, activations: Activations, options: Options
) -> StageInput:
    """Choose a step for each channel and fold it into the norm (paper 4.1 and 4.2)."""
    assert stage.norm is not None
    first, batches = stage.linears[0].name, activations.batches[: activations.statistics]
    largest = LargestMagnitude()
    block.observe(first, batches, largest.add)
    clip = _channel_clips(block, stage, batches, largest.get(), options)
    name = f"{stage.norm.name}.weight"
    folded = fold_norm(
        block.stored[name].to(clip.device),
        None,
        activation_steps(largest.get(), clip, BITS),
        one_plus=stage.norm.multiplier == "one_plus",
    )
    norm: Any = block.module.get_submodule(stage.norm.name)
    norm.weight = nn.Parameter(folded.weight.to(torch.float32), requires_grad=False)
    return StageInput(
        step=folded.step,
        clip=None,
        dequantized=lambda x: static_codes(x, BITS, CodeLayout.FLOAT32),
        norm=stage.norm.name,
        tensors={name: folded.weight.to(block.stored[name].dtype)},
        clip_report={
            "lowest": round(float(clip.min()), 4),
            "mean": round(float(clip.mean()), 4),
            "highest": round(float(clip.max()), 4),
        },
    )


def _channel_clips(
    block: Block, stage: Stage, batches: list[Tensor], largest: Tensor, options: Options
) -> Tensor:
    if options.clipping == "none":
        return torch.ones_like(largest, dtype=torch.float64)
    grid = clip_grid(options.lowest_clip, options.clip_points)
    seen = ChannelClipStatistics.empty(len(grid), len(largest), largest.device)
    block.observe(stage.linears[0].name, batches, lambda x: seen.add(x, largest, grid, BITS))
    return choose_channel_clips(seen, _stacked_weights(block, stage), largest, grid, BITS)


def _dynamic_input(
    block: Block, stage: Stage, activations: Activations, options: Options
) -> StageInput:
    """Search one clip ratio for the stage's per-token steps (paper 4.2)."""
    device = activations.batches[0].device
    clip = torch.ones(1, dtype=torch.float32, device=device)
    if options.clipping == "adaptive":
        grid = clip_grid(options.lowest_clip, options.clip_points)
        weights = _stacked_weights(block, stage)
        losses = torch.zeros(len(grid), dtype=torch.float64, device=device)
        batches = activations.batches[: activations.statistics]
        block.observe(
            stage.linears[0].name,
            batches,
            lambda x: losses.add_(token_clip_losses(x, weights, grid, BITS)),
        )
        clip = grid[losses.argmin().cpu()].reshape(1).to(device, torch.float32)

    def dequantized(x: Tensor) -> Tensor:
        codes, step = token_codes(x, clip, BITS, CodeLayout.FLOAT32)
        return codes * step

    report = round(float(clip), 4)
    return StageInput(None, clip, dequantized, norm=None, tensors={}, clip_report=report)


def _stacked_weights(block: Block, stage: Stage) -> Tensor:
    return torch.cat([block.weight(linear.name) for linear in stage.linears])


def _inverse(hessian: Tensor, options: Options, name: str) -> InverseHessian | None:
    try:
        return invert_hessian(hessian, options.damping)
    except NotPositiveDefiniteError as error:
        logger.warning("%s and its neighbours are rounded to nearest: %s", name, error)
        return None


def _quantize_linear(
    block: Block,
    name: str,
    source: StageInput,
    hessian: Tensor,
    inverse: InverseHessian | None,
    options: Options,
) -> LinearResult:
    """Codes of one linear; puts the quantized linear into the block."""
    weight = block.weight(name).to(torch.float64)
    if source.step is not None:
        weight = migrate_weight(weight, source.step)
    step = weight_steps(weight, BITS)
    nearest = round_to_nearest(weight, step, BITS)
    rtn_loss = output_loss(weight, nearest, step, hessian)
    codes, gptq_loss = nearest, None
    if inverse is not None:
        codes = gptq(weight, step, inverse, BITS, options.gptq_block)
        gptq_loss = output_loss(weight, codes, step, hessian)
    bias = block.stored.get(f"{name}.bias")
    float_bias = None if bias is None else bias.to(codes.device, torch.float32)
    form = LinearFormat(
        shape=(codes.shape[0], codes.shape[1]),
        activations="static" if source.clip is None else "dynamic",
        norm=source.norm,
        bias=bias is not None,
    )
    block.replace(
        name, QuantizedLinear(form, codes, step[:, None], bias=float_bias, clip=source.clip)
    )
    tensors = {
        f"{name}.weight_packed": pack(codes.cpu(), BITS),
        f"{name}.weight_scale": step.to(torch.bfloat16)[:, None],
    }
    if source.clip is not None:
        tensors[f"{name}.input_clip"] = source.clip.cpu().clone()
    report = {
        "activations": "static" if source.clip is None else "dynamic",
        "loss_rtn": rtn_loss,
        "loss_gptq": gptq_loss,
        "clip": source.clip_report,
        "damping": None if inverse is None else inverse.damping,
    }
    loss = rtn_loss if gptq_loss is None else gptq_loss
    return LinearResult(linear=name, tensors=tensors, report=report, loss=loss)

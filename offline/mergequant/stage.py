"""One stage of a block: the input's steps, then the codes of the linears that share that input."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergequant.architecture import Stage
from mergequant.contract import linear_format
from mergequant.decoder import Activations, Block
from mergequant.methods.gptq import (
    InverseHessian,
    NotPositiveDefiniteError,
    gptq,
    invert_hessian,
    output_loss,
    round_to_nearest,
)
from mergequant.methods.migrate import migrate_weight
from mergequant.methods.reconstruct import fold_columns
from mergequant.methods.weights import WeightForm, WeightGrid, weight_grid
from mergequant.options import Options
from mergequant.quantized_linear import QuantizedLinear
from mergequant.stage_input import StageInput, read_stage_input
from mergequant.statistics import Hessian
from mergequant_vllm.packing import pack

logger = logging.getLogger("mergequant")


@dataclass(frozen=True)
class LinearResult:
    """One quantized linear: what to store, by name within the block, and a line of the report."""

    linear: str
    tensors: dict[str, Tensor]
    report: dict[str, Any]
    loss: float


def quantize_stage(
    block: Block, stage: Stage, activations: Activations, options: Options
) -> Iterator[LinearResult]:
    """Quantize a stage's linears and put them into the block, so that later stages see them."""
    began = time.monotonic()
    source = read_stage_input(block, stage, activations, options)
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
    original = block.weight(name)
    weight = folded_weight(original.to(torch.float64), source)
    form = WeightForm(
        options.weight_bits, options.group_size, options.asymmetric, options.weight_search
    )
    grid = weight_grid(weight, form)
    codes = round_to_nearest(weight, grid)
    rtn_loss = output_loss(weight, codes, grid, hessian)
    gptq_loss = None
    if inverse is not None:
        codes = gptq(weight, grid, inverse, options.gptq_block)
        gptq_loss = output_loss(weight, codes, grid, hessian)
    _replace(block, name, source, original.shape, codes, grid, options)
    tensors = {
        "weight_packed": pack(codes.cpu(), options.weight_bits),
        "weight_scale": grid.step.to(torch.bfloat16).cpu(),
        **source.stored(),
    }
    if grid.zero_points is not None:
        tensors["weight_zero_point"] = grid.zero_points.cpu()
    report = {
        "activations": "dynamic" if source.norm is None else "static",
        "loss_rtn": rtn_loss,
        "loss_gptq": gptq_loss,
        **source.report,
        "damping": None if inverse is None else inverse.damping,
    }
    stored = {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    return LinearResult(name, stored, report, rtn_loss if gptq_loss is None else gptq_loss)


def folded_weight(weight: Tensor, source: StageInput) -> Tensor:
    """W as its codes will be chosen: steps migrated into it, columns reconstructed; [out, K]."""
    if source.step is None:
        return weight
    if source.reconstruction is None:
        return migrate_weight(weight, source.step)
    return fold_columns(weight, source.step, source.reconstruction)


def _replace(
    block: Block,
    name: str,
    source: StageInput,
    shape: torch.Size,
    codes: Tensor,
    grid: WeightGrid,
    options: Options,
) -> None:
    bias = block.stored.get(f"{name}.bias")
    form = linear_format(
        options,
        (shape[0], shape[1]),
        norm=source.norm,
        bias=bias is not None,
        hadamard=source.hadamard,
    )
    shaped = source.reconstruction
    module = QuantizedLinear(
        form,
        codes,
        grid.step,
        zero_points=grid.zero_points,
        bias=None if bias is None else bias.to(codes.device, torch.float32),
        clip=source.clip,
        index=None if shaped is None else shaped.index.to(torch.int32),
        offset=None if shaped is None else shaped.offset,
    )
    block.replace(name, module)

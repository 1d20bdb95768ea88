"""One stage of a block: the input's steps, then the codes of the linears that share that input."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergequant.calibration.statistics import Hessian
from mergequant.errors import InputError
from mergequant.layers.served_linear import from_stored, stored_weight
from mergequant.layers.simulated_linear import FixedWeight, SimulatedLinear
from mergequant.methods.gptq import (
    InverseHessian,
    NotPositiveDefiniteError,
    gptq_working_weight,
    invert_hessian,
    output_loss,
    round_to_nearest,
)
from mergequant.methods.low_rank import trainable_elements
from mergequant.methods.weights import WeightForm, WeightGrid, largest_weight, weight_grid
from mergequant.model.architecture import Stage
from mergequant.model.decoder import Activations, Block
from mergequant.options import Options
from mergequant.quantizer.inputs.dynamic import dynamic_input
from mergequant.quantizer.inputs.record import StageInput, refuse_infinite
from mergequant.quantizer.inputs.static import static_input
from mergequant_vllm.format import LinearFormat

logger = logging.getLogger("mergequant")


@dataclass(frozen=True)
class Rounding:
    """How a linear's codes came about.

    Attributes:
        grid: steps and zero points.
        codes: int8 [out, K].
        working: float32 [out, K], whose nearest codes are `codes`; only for the compensation.
        trainable: bool [out, K], see `low_rank`; only for the compensation.
    """

    grid: WeightGrid
    codes: Tensor
    working: Tensor | None = None
    trainable: Tensor | None = None


@dataclass(frozen=True)
class LinearResult:
    """One quantized linear.

    Attributes:
        linear: its name within the block.
        tensors: what to store, by name within the block; empty if nothing of it can be stored.
        report: a line of the report.
        loss: relative squared error at its output.
        source: how it reads its input.
        rounding: the codes and what they came from; None if the weight stays as it is.
    """

    linear: str
    tensors: dict[str, Tensor]
    report: dict[str, Any]
    loss: float
    source: StageInput
    rounding: Rounding | None


def quantize_stage(
    block: Block,
    stage: Stage,
    activations: Activations,
    options: Options,
    linears: Mapping[str, LinearFormat],
) -> Iterator[LinearResult]:
    """Quantize a stage's linears and put them into the block, so that later stages see them.

    Args:
        linears: how each linear of the block is to be stored, by name.
    """
    began = time.monotonic()
    first = stage.linears[0].name
    source = _read_input(block, stage, activations, options, linears[first])
    calibration = time.monotonic() - began
    began = time.monotonic()
    hessian = _hessian(block, first, source, activations, options)
    inverse = None
    if options.weights == "gptq":
        inverse = _inverse(hessian, options, block.name_of(first))
    for number, linear in enumerate(stage.linears):
        result = _quantize_linear(
            block, linear.name, source, hessian, inverse, options, linears[linear.name]
        )
        result.report["seconds"] = {
            "calibration": round(calibration, 3) if number == 0 else 0.0,
            "compensation": 0.0,
            "codes": round(time.monotonic() - began, 3),
        }
        began = time.monotonic()
        if number == 0:
            result.tensors.update(source.tensors)
        yield result


def _read_input(
    block: Block, stage: Stage, activations: Activations, options: Options, form: LinearFormat
) -> StageInput:
    batches = activations.batches[: activations.statistics]
    if stage.norm is not None and form.activations == "static":
        return static_input(block, stage, stage.norm, batches, options, form)
    return dynamic_input(block, stage, batches, options, form)


def _hessian(
    block: Block, first: str, source: StageInput, activations: Activations, options: Options
) -> Tensor:
    """Of what the linears' products will really see: float64 [K, K]."""
    seen = Hessian()
    used = activations.gptq if options.weights == "gptq" else activations.statistics
    batches = activations.batches[:used]
    block.observe(first, batches, lambda x: seen.add(source.dequantized(x)))
    hessian = seen.get()
    refuse_infinite(hessian.diagonal(), f"The input of {block.name_of(first)}")
    return hessian


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
    form: LinearFormat,
) -> LinearResult:
    """Codes of one linear; puts the quantized linear into the block."""
    weight = source.folded_weight(block.weight(name).to(torch.float64))
    report: dict[str, Any] = {"activations": form.activations, **source.report}
    if options.weights == "none":
        fixed = FixedWeight(weight.to(torch.float32))
        replace_by_simulated(block, name, source.dequantized, fixed)
        report |= {"loss_rtn": None, "loss_gptq": None, "damping": None}
        return LinearResult(name, {}, report, 0.0, source, None)
    _refuse_unstorable(weight, options.weight_bits, block.name_of(name))
    grid = weight_grid(weight, weight_form(options))
    working, loss_gptq = weight, None
    codes = round_to_nearest(weight, grid)
    loss = loss_rtn = output_loss(weight, codes, grid, hessian)
    if inverse is not None:
        working = gptq_working_weight(weight, grid, inverse, options.gptq_block)
        codes = round_to_nearest(working, grid)
        loss = loss_gptq = output_loss(weight, codes, grid, hessian)
    report |= {
        "loss_rtn": loss_rtn,
        "loss_gptq": loss_gptq,
        "damping": None if inverse is None else inverse.damping,
    }
    rounding = Rounding(grid, codes)
    if options.compensated:
        trainable = trainable_elements(weight, grid)
        rounding = Rounding(grid, codes, working.to(torch.float32), trainable)
    tensors = stored_tensors(name, source, rounding)
    result = LinearResult(name, tensors, report, loss, source, rounding)
    replace_by_stored(block, result, form)
    return result


def weight_form(options: Options) -> WeightForm:
    """How weights are rounded."""
    return WeightForm(
        options.weight_bits, options.group_size, options.asymmetric, options.weight_search
    )


def _refuse_unstorable(weight: Tensor, bits: int, linear: str) -> None:
    """Raise InputError if a weight exceeds what the largest 16-bit step can stand for."""
    largest, limit = float(weight.abs().amax()), largest_weight(bits)
    if largest > limit:
        raise InputError(
            f"The weight of {linear}, times its input's steps, reaches {largest:.1e}, beyond the "
            f"{limit:.1e} that {bits}-bit codes with 16-bit steps hold: check that the model's "
            "files are whole and that it answers sensibly."
        )


def stored_tensors(name: str, source: StageInput, rounding: Rounding) -> dict[str, Tensor]:
    """What a checkpoint stores of a linear, by name within the block."""
    tensors = {**stored_weight(rounding.codes, rounding.grid), **source.stored()}
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def replace_by_stored(block: Block, result: LinearResult, form: LinearFormat) -> None:
    """Put the linear into the block as the server will compute it; simulated where none will."""
    name = result.linear
    if form.activations == "dynamic" and result.source.clip is None:
        assert result.rounding is not None
        weight = result.rounding.grid.dequantize(result.rounding.codes)
        fixed = FixedWeight(weight.to(torch.float32))
        replace_by_simulated(block, name, result.source.dequantized, fixed)
        return
    device = block.device
    bias = block.stored.get(f"{name}.bias")

    def read(suffix: str) -> Tensor:
        if suffix == "bias":
            assert bias is not None
            return bias.to(device)
        return result.tensors[f"{name}.{suffix}"].to(device)

    block.replace(name, from_stored(form, read, torch.float32))


def replace_by_simulated(
    block: Block, name: str, read: Callable[[Tensor], Tensor], weight: nn.Module
) -> None:
    """Put a linear of floating-point products into the block, see `SimulatedLinear`."""
    bias = block.stored.get(f"{name}.bias")
    if bias is not None:
        bias = bias.to(block.device, torch.float32)
    block.replace(name, SimulatedLinear(read, weight, bias))

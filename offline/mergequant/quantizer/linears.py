"""The linears of a block that read one input: its steps first, then the codes of each."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mergequant.calibration.statistics import Hessian
from mergequant.errors import InputError
from mergequant.layers.in_block import replace_by_served, replace_by_simulated
from mergequant.layers.simulated_linear import FixedWeight
from mergequant.methods.gptq import (
    InverseHessian,
    NotPositiveDefiniteError,
    gptq_working_weight,
    invert_hessian,
    output_energy,
    output_loss,
    round_to_nearest,
)
from mergequant.methods.low_rank import trainable_elements
from mergequant.methods.weights import largest_weight, weight_grid
from mergequant.model.decoder import Activations, Block
from mergequant.quantizer.inputs.record import CalibratedInput, refuse_infinite
from mergequant.quantizer.plan import ReadersPlan, WeightPlan
from mergequant.quantizer.result import LinearResult, ReportLine, Rounding
from mergequant_vllm.format import LinearFormat

logger = logging.getLogger("mergequant")


def quantize_linears(
    block: Block,
    plan: ReadersPlan,
    activations: Activations,
    formats: Mapping[str, LinearFormat],
    known: dict[str, list[Tensor]],
    *,
    trained: bool,
) -> Iterator[LinearResult]:
    """Quantize linears that read one input, and put them into the block for what comes after.

    Args:
        formats: how each linear of the block is to be stored, by name.
        known: gets what a linear reads of the first batches, [tokens, n] each, by its name.
        trained: the compensation goes on from the results.
    """
    began = time.monotonic()
    names = list(plan.weights)
    source, inputs = plan.input.calibrate(
        block, names, activations.batches[: activations.statistics]
    )
    calibration = time.monotonic() - began
    began = time.monotonic()
    hessian = _hessian(block, names[0], source, inputs, activations.batches[: activations.gptq])
    if len(names) == 1 and not trained:
        known[names[0]] = inputs[: len(activations.batches)]
    del inputs
    inverse = _inverse(plan.weights[names[0]], hessian, block.name_of(names[0]))
    for number, (name, weight_plan) in enumerate(plan.weights.items()):
        line = ReportLine(block.name_of(name), plan.input.kind, dict(source.report))
        if number == 0:
            line.seconds["calibration"] = calibration
        result = _quantize_linear(block, name, source, hessian, inverse, weight_plan, line, trained)
        if result.rounding is None or not source.is_served:
            _replace_by_simulated(block, result)
        else:
            replace_by_served(block, name, formats[name], result.codes, result.tensors())
        line.seconds["codes"] = time.monotonic() - began
        began = time.monotonic()
        yield result


def _hessian(
    block: Block,
    first: str,
    source: CalibratedInput,
    inputs: Sequence[Tensor],
    batches: Sequence[Tensor],
) -> Tensor:
    """Hessian of what the linears' products really read: float64 [K, K].

    Args:
        inputs: what the linears read of the first batches, where that is known already.
        batches: hidden states.
    """
    hessian = Hessian()
    known = inputs[: len(batches)]
    for x in known:
        hessian.add(source.dequantized(x))
    block.observe(first, batches[len(known) :], lambda x: hessian.add(source.dequantized(x)))
    matrix = hessian.get()
    refuse_infinite(matrix.diagonal(), f"The input of {block.name_of(first)}")
    return matrix


def _inverse(plan: WeightPlan | None, hessian: Tensor, name: str) -> InverseHessian | None:
    if plan is None or plan.rounding != "gptq":
        return None
    try:
        return invert_hessian(hessian, plan.damping)
    except NotPositiveDefiniteError as error:
        logger.warning("%s and its neighbours are rounded to nearest: %s", name, error)
        return None


def _quantize_linear(
    block: Block,
    name: str,
    source: CalibratedInput,
    hessian: Tensor,
    inverse: InverseHessian | None,
    plan: WeightPlan | None,
    line: ReportLine,
    trained: bool,
) -> LinearResult:
    """Codes of one linear."""
    original = block.weight(name)
    weight = source.folded_weight(original.to(torch.float64))
    offset = source.output_offset(original)
    if plan is None:
        return LinearResult(name, line, source, weight.float(), offset, None)
    _refuse_unstorable(weight, plan.form.bits, block.name_of(name))
    grid = weight_grid(weight, plan.form, plan.search)
    energy = output_energy(weight, hessian)
    working = weight
    codes = round_to_nearest(weight, grid)
    line.loss_rtn = line.loss = output_loss(weight, codes, grid, hessian, energy)
    if inverse is not None:
        working = gptq_working_weight(weight, grid, inverse, plan.gptq_block)
        codes = round_to_nearest(working, grid)
        line.loss_gptq = line.loss = output_loss(weight, codes, grid, hessian, energy)
        line.damping = inverse.damping
    rounding = Rounding(grid, codes)
    if trained:
        rounding = Rounding(grid, codes, working.float(), trainable_elements(weight, grid))
    return LinearResult(name, line, source, None, offset, rounding)


def _refuse_unstorable(weight: Tensor, bits: int, linear: str) -> None:
    """Raise InputError if a weight exceeds what the largest 16-bit step can stand for."""
    largest, limit = float(weight.abs().amax()), largest_weight(bits)
    if largest > limit:
        raise InputError(
            f"The weight of {linear}, times its input's steps, reaches {largest:.1e}, beyond the "
            f"{limit:.1e} that {bits}-bit codes with 16-bit steps hold: check that the model's "
            "files are whole and that it answers sensibly."
        )


def _replace_by_simulated(block: Block, result: LinearResult) -> None:
    """Put a linear that no checkpoint holds into the block."""
    weight = FixedWeight(result.floating_weight())
    replace_by_simulated(
        block, result.name, result.source.dequantized, weight, result.output_offset
    )

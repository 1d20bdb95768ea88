"""The linears of a block that read one input: its steps first, then the codes of each."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mergequant.calibration.statistics import SplitMoments
from mergequant.errors import InputError
from mergequant.layers.in_block import replace_by_served, replace_by_simulated
from mergequant.layers.simulated_linear import FixedWeight
from mergequant.methods.correct import InputMoments, best_correction
from mergequant.methods.gptq import (
    InverseHessian,
    NotPositiveDefiniteError,
    gptq_working_weight,
    invert_hessian,
    output_energy,
    output_loss,
    round_to_nearest,
)
from mergequant.methods.trained_weight import trainable_elements
from mergequant.methods.weights import largest_weight, weight_grid
from mergequant.model.block import Block
from mergequant.model.decoder import Activations
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
    moments = _moments(block, plan, source, inputs, activations.batches[: activations.gptq])
    if len(names) == 1 and not trained:
        known[names[0]] = inputs[: len(activations.batches)]
    del inputs
    weights = _weights(block, plan, source, moments)
    hessian = moments.fitted.hessian()
    held_out = moments.held_out.hessian() if moments.held_out.tokens else None
    del moments
    inverse = _inverse(plan.weights[names[0]], hessian, block.name_of(names[0]))
    for number, (name, weight_plan) in enumerate(plan.weights.items()):
        line = ReportLine(block.name_of(name), plan.input.kind, dict(source.report))
        if number == 0:
            line.seconds["calibration"] = calibration
        offset = source.output_offset(block.weight(name))
        weight = weights.pop(name)
        if weight_plan is None:
            result = LinearResult(name, line, source, weight.float(), offset, None)
        else:
            _refuse_unstorable(weight, weight_plan.form.bits, line.linear)
            rounding = _round(weight, hessian, inverse, weight_plan, line, trained)
            if held_out is not None:
                line.loss_held_out = output_loss(weight, rounding.codes, rounding.grid, held_out)
            result = LinearResult(name, line, source, None, offset, rounding)
        if result.rounding is None or not source.is_served:
            _replace_by_simulated(block, result)
        else:
            replace_by_served(block, name, formats[name], result.codes, result.tensors())
        line.seconds["codes"] = time.monotonic() - began
        began = time.monotonic()
        yield result


def _moments(
    block: Block,
    plan: ReadersPlan,
    source: CalibratedInput,
    inputs: Sequence[Tensor],
    batches: Sequence[Tensor],
) -> SplitMoments:
    """Moments of what the linears' products really read.

    Args:
        inputs: what the linears read of the first batches, where that is known already.
        batches: hidden states.
    """
    first = next(iter(plan.weights))
    moments = SplitMoments()

    def add(x: Tensor) -> None:
        moments.add(source.dequantized(x), source.unrounded(x) if plan.corrected else None)

    known = inputs[: len(batches)]
    for x in known:
        add(x)
    block.observe(first, batches[len(known) :], add)
    refuse_infinite(moments.fitted.products.diagonal(), f"The input of {block.name_of(first)}")
    return moments


def _weights(
    block: Block, plan: ReadersPlan, source: CalibratedInput, moments: SplitMoments
) -> dict[str, Tensor]:
    """What is to be rounded of each linear: float64 [out, K], corrected where that is planned."""
    folded = {
        name: source.folded_weight(block.weight(name).to(torch.float64)) for name in plan.weights
    }
    if not plan.corrected or moments.held_out.tokens == 0:
        return folded
    fitted, held_out = (
        InputMoments(x.products, x.lost) for x in (moments.fitted, moments.held_out)
    )
    stacked = torch.cat([weight.to(torch.float32) for weight in folded.values()])
    added = best_correction(stacked, fitted, held_out)
    del stacked
    if added is not None:
        rows = [len(weight) for weight in folded.values()]
        for name, part in zip(list(folded), torch.split(added, rows), strict=True):
            folded[name] = folded[name] + part
    return folded


def _inverse(plan: WeightPlan | None, hessian: Tensor, name: str) -> InverseHessian | None:
    if plan is None or plan.rounding != "gptq":
        return None
    try:
        return invert_hessian(hessian, plan.damping)
    except NotPositiveDefiniteError as error:
        logger.warning("%s and its neighbours are rounded to nearest: %s", name, error)
        return None


def _round(
    weight: Tensor,
    hessian: Tensor,
    inverse: InverseHessian | None,
    plan: WeightPlan,
    line: ReportLine,
    trained: bool,
) -> Rounding:
    """Codes of one linear's weight [out, K]; notes their losses in `line`."""
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
    if not trained:
        return Rounding(grid, codes)
    return Rounding(grid, codes, working.float(), trainable_elements(weight, grid))


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

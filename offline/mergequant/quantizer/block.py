"""One block: its linears in order of execution, then the compensation of all of them."""

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mergequant.layers.in_block import replace_by_served
from mergequant.model.architecture import Architecture
from mergequant.model.block import Block
from mergequant.model.decoder import Activations
from mergequant.quantizer.linears import quantize_linears
from mergequant.quantizer.plan import BlockPlan, TrainingPlan
from mergequant.quantizer.result import LinearResult
from mergequant.quantizer.train_compensation import compensate


def quantize_block(
    block: Block,
    architecture: Architecture,
    activations: Activations,
    targets: Sequence[Tensor],
    plan: BlockPlan,
    bar: Any,
) -> list[LinearResult]:
    """Quantize a block; its linears are then as the checkpoint will have them.

    Without training, the hidden states in `activations` go on with the work: each becomes what the
    last norm reads that all linears before have done their part for.

    Args:
        targets: what the full-precision model emits behind the block, for as many batches as the
            compensation trains on.
        bar: a tqdm bar with a step for each linear and each epoch of the compensation.
    """
    results: list[LinearResult] = []
    trained = plan.training is not None
    borders = {} if trained else borders_within(architecture)
    ahead = dict(borders)
    known: dict[str, list[Tensor]] = {}
    for readers in plan.readers:
        first = next(iter(readers.weights))
        if first in ahead:
            norm, before = ahead.pop(first)
            inputs = known.pop(before[-1], [])
            block.leave_behind(before, norm, activations.batches, inputs)
            del inputs
        walk = quantize_linears(block, readers, activations, plan.formats, known, trained=trained)
        for result in walk:
            results.append(result)
            bar.set_postfix_str(f"loss={result.line.loss:.2e}{_growth(result)}")
            bar.update()
    last = architecture.linears[-1]
    if borders and not ahead and last.writes == architecture.residual:
        # Every border is passed: the block's output is the last linear's, added to what is there.
        inputs = known.pop(last.name, [])
        block.add_output(last.name, activations.batches, inputs)
        activations.behind = len(inputs)
    if plan.training is not None and results:
        results = _compensated(block, activations, targets, results, plan, plan.training, bar)
    return results


def borders_within(architecture: Architecture) -> dict[str, tuple[str, list[str]]]:
    """Norms at which a pass through the block can begin anew, by the first linear behind each.

    Such a norm reads the residual after another part of the block has added its output to it.

    Returns:
        for each: the norm, and the linears before it, all in one submodule.
    """
    borders: dict[str, tuple[str, list[str]]] = {}
    if not architecture.resumes:
        return borders
    before: list[str] = []
    last_write: object = None
    for readers in architecture.readers():
        norm = readers.norm
        residual = architecture.residual
        if norm is not None and norm.reads == residual == last_write:
            owners = {name.partition(".")[0] for name in before}
            if len(owners) == 1:
                borders[readers.linears[0].name] = (norm.name, before)
            before = []
        before = before + [linear.name for linear in readers.linears]
        last_write = readers.linears[-1].writes
    return borders


def _growth(result: LinearResult) -> str:
    """Growth of the linear's input by reconstruction, as the bar shows it."""
    columns = result.line.input.get("reconstruction")
    return f", K{columns['growth']:+.1%}" if columns else ""


def _compensated(
    block: Block,
    activations: Activations,
    targets: Sequence[Tensor],
    results: list[LinearResult],
    plan: BlockPlan,
    training: TrainingPlan,
    bar: Any,
) -> list[LinearResult]:
    """The results with trained codes, if those serve held-out windows better."""
    began = time.monotonic()

    def epoch_done(loss: float) -> None:
        bar.set_postfix_str(f"block's held-out loss={loss:.2e}{_growth(results[0])}")
        bar.update()

    inputs = activations.batches[: len(targets)]
    outcome = compensate(block, inputs, targets, results, training, epoch_done)
    bar.update(training.epochs - outcome.epochs)
    kept = [x.with_codes(outcome.codes.get(x.name, x.codes)) for x in results]
    for result in kept:
        replace_by_served(
            block, result.name, plan.formats[result.name], result.codes, result.tensors()
        )
    line = kept[0].line
    line.compensation = {
        "loss_before": outcome.before,
        "loss_after": outcome.after,
        "epochs": outcome.epochs,
        "kept": bool(outcome.codes),
    }
    line.seconds["compensation"] = time.monotonic() - began
    return kept

"""One block: its stages in order of execution, then the compensation of all of them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mergequant.model.architecture import Architecture
from mergequant.model.decoder import Activations, Block
from mergequant.options import Options
from mergequant.quantizer.linears import (
    LinearResult,
    Rounding,
    quantize_stage,
    replace_by_stored,
    stored_tensors,
)
from mergequant.quantizer.train_compensation import compensate
from mergequant_vllm.format import LinearFormat


def quantize_block(
    block: Block,
    architecture: Architecture,
    activations: Activations,
    targets: Sequence[Tensor],
    options: Options,
    linears: Mapping[str, LinearFormat],
    bar: Any,
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Quantize a block; its linears are then as the checkpoint will have them.

    Args:
        targets: what the full-precision model emits behind the block, for as many batches as the
            compensation trains on.
        linears: how each linear is to be stored, by name within the block.
        bar: a tqdm bar with a step for each linear and each epoch of the compensation.

    Returns:
        what to store of the block, by name within it, and its lines of the report.
    """
    results = []
    for stage in architecture.stages():
        for result in quantize_stage(block, stage, activations, options, linears):
            results.append(result)
            bar.set_postfix_str(f"loss={result.loss:.2e}{_growth(result)}")
            bar.update()
    if options.compensated:
        results = _compensated(block, activations, targets, results, options, linears, bar)
    tensors = {
        name: tensor
        for name, tensor in block.stored.items()
        if not name.endswith(architecture.ignored_suffixes)
    }
    for result in results:
        if result.tensors:
            tensors.pop(f"{result.linear}.weight")
        tensors.update(result.tensors)
    report = [{"linear": block.name_of(x.linear), **x.report} for x in results]
    return tensors, report


def _growth(result: LinearResult) -> str:
    """How much longer reconstruction made the linear's input."""
    found = result.report.get("reconstruction")
    return f", K{found['growth']:+.1%}" if found else ""


def _compensated(
    block: Block,
    activations: Activations,
    targets: Sequence[Tensor],
    results: Sequence[LinearResult],
    options: Options,
    linears: Mapping[str, LinearFormat],
    bar: Any,
) -> list[LinearResult]:
    """The results with trained codes, if those serve held-out windows better."""
    began = time.monotonic()

    def epoch_done(loss: float) -> None:
        bar.set_postfix_str(f"block's held-out loss={loss:.2e}{_growth(results[0])}")
        bar.update()

    inputs = activations.batches[: len(targets)]
    found = compensate(block, inputs, targets, results, options, epoch_done)
    bar.update(options.compensation_epochs - found.epochs)
    kept = list(_with_codes(results, found.codes))
    for result in kept:
        replace_by_stored(block, result, linears[result.linear])
    kept[0].report["compensation"] = {
        "loss_before": found.before,
        "loss_after": found.after,
        "epochs": found.epochs,
        "kept": bool(found.codes),
    }
    kept[0].report["seconds"]["compensation"] = round(time.monotonic() - began, 3)
    return kept


def _with_codes(
    results: Sequence[LinearResult], codes: Mapping[str, Tensor]
) -> Iterator[LinearResult]:
    for result in results:
        if result.rounding is None or result.linear not in codes:
            yield result
            continue
        rounding = Rounding(result.rounding.grid, codes[result.linear])
        trained = stored_tensors(result.linear, result.source, rounding)
        yield replace(result, rounding=rounding, tensors={**result.tensors, **trained})

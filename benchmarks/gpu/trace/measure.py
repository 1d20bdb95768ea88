"""Part `trace`: kernels of one decoder block, counted by the profiler in vLLM.

Llama-2-7B's widths with 2 and with 4 blocks: half the difference of the counts is one block.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.common.child_cells import run_child
from benchmarks.common.result_cells import Record
from benchmarks.gpu.context import Context

DEFAULT_VARIANTS = ("bf16", "int8", "mergequant")
MODES = ("eager", "compiled")
DEPTHS = (2, 4)
ENGINE_SECONDS = 150.0


def foreign(key: str) -> bool:
    """Whether a cell has nothing of ours in it."""
    return not key.startswith("mergequant")


def run(context: Context) -> None:
    """Trace every variant in every mode that is not done."""
    variants = context.options.get("variants") or DEFAULT_VARIANTS
    modes = MODES[:1] if context.smoke else MODES
    keys = {f"{variant} {mode}": (variant, mode) for mode in modes for variant in variants}
    for key in context.cells.pending(keys):
        variant, mode = keys[key]
        context.measure(key, functools.partial(_trace, context, variant, mode))


def _trace(context: Context, variant: str, mode: str) -> Record:
    """Trace at both depths in one process; what fails there after the first, in another."""
    depths: dict[int, Any] = {}
    fault = _run_engines(context, variant, mode, DEPTHS, depths)
    missing = [blocks for blocks in DEPTHS if blocks not in depths]
    if depths and missing:
        fault = _run_engines(context, variant, mode, missing, depths)
    if len(depths) < len(DEPTHS):
        raise RuntimeError(fault)
    return per_block(*(depths[blocks] for blocks in DEPTHS))


def _run_engines(
    context: Context, variant: str, mode: str, blocks: Sequence[int], depths: dict[int, Any]
) -> str | None:
    """Put the counts of each depth into `depths`; returns what happened, if it did not end well."""
    context.cells.check_time()
    arguments = ["--variant", variant, "--model", "tiny" if context.smoke else "Llama-2-7B"]
    arguments += ["--blocks", *map(str, blocks)]
    arguments += ["--eager"] if mode == "eager" else []
    if context.options.get("attention"):
        arguments += ["--attention", context.options["attention"]]

    def on_cell(depth: str, record: dict[str, Any]) -> None:
        depths[int(depth)] = record

    left = min(ENGINE_SECONDS * len(blocks), context.cells.end - time.time() + 30)
    log = context.folder / f"trace-{variant.replace(':', '-')}-{mode}-{blocks[0]}.log"
    return run_child("benchmarks.gpu.trace.child", arguments, on_cell, left, log)


def per_block(shallow: Record, deep: Record) -> Record:
    """Kernels a block from counts at two depths.

    Returns:
        `prefill` and `decode`: for each kernel its number a block and forward pass; `kernels`.
    """
    blocks, steps = DEPTHS[1] - DEPTHS[0], deep["steps"]
    prefill = _difference(deep["prefill"], shallow["prefill"])
    whole = _difference(deep["all"], shallow["all"])
    decode = _difference(whole, prefill)
    return {
        "kernels": deep["kernels"],
        "prefill": {name: count / blocks for name, count in prefill.items()},
        "decode": {name: count / blocks / steps for name, count in decode.items()},
    }


def _difference(more: dict[str, int], fewer: dict[str, int]) -> dict[str, int]:
    difference = {name: more.get(name, 0) - fewer.get(name, 0) for name in {**more, **fewer}}
    return {name: count for name, count in difference.items() if count}

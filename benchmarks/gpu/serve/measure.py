"""Part `serve`: Llama-2-7B's shape end to end in vLLM, random weights, each variant in a process.

The paper's setting: 2048 tokens in, 256 out, batch 1 to 64 (Tables 2 and 3, Figure 3). One engine a
variant, compiled and with CUDA graphs; a cell is one variant and one batch.
"""

import time
from typing import Any

from benchmarks.common.child_cells import run_child
from benchmarks.gpu.context import Context

DEFAULT_VARIANTS = ("bf16", "mergequant", "marlin-w4a16", "int8", "fp8")
BATCHES = (1, 8, 16, 32, 64)
MODEL, PREFILL, DECODE = "Llama-2-7B", 2048, 256
SMOKE_BATCHES = (1, 2)
VARIANT_SECONDS = 240.0  # what one variant may take at most; 90 are expected


def foreign(key: str) -> bool:
    """Whether a cell has nothing of ours in it."""
    return not key.startswith("mergequant")


def run(context: Context) -> None:
    """Start one process for each variant that has a batch to measure."""
    options = context.options
    variants = options.get("variants") or DEFAULT_VARIANTS
    batches = options.get("batches") or (SMOKE_BATCHES if context.smoke else BATCHES)
    for variant in variants:
        keys = {f"{variant} batch={batch}": batch for batch in batches}
        wanted = [keys[key] for key in context.cells.pending(keys)]
        if wanted:
            context.cells.check_time()
            _run_variant(context, variant, wanted)


def _run_variant(context: Context, variant: str, batches: list[int]) -> None:
    cells = context.cells
    left = min(VARIANT_SECONDS, cells.end - time.time())
    arguments = ["--variant", variant, "--model", "tiny" if context.smoke else MODEL]
    arguments += ["--batches", *map(str, batches), "--end", str(time.time() + left)]
    sizes = (16, 4) if context.smoke else (PREFILL, DECODE)
    arguments += ["--prefill", str(sizes[0]), "--decode", str(sizes[1])]
    if context.options.get("attention"):
        arguments += ["--attention", context.options["attention"]]
    if context.smoke:
        arguments += ["--eager"]

    def on_cell(batch: str, record: dict[str, Any]) -> None:
        cells.put(f"{variant} batch={batch}", record)
        if "whole_seconds" in record:
            print(f"  {variant} batch {batch}: {record['whole_seconds']:.2f} s", flush=True)

    log = context.folder / f"serve-{variant.replace(':', '-').replace('+', '-')}.log"
    fault = run_child("benchmarks.gpu.serve.child", arguments, on_cell, left + 30, log)
    if fault is None:
        return
    print(f"  {variant}: {fault}", flush=True)
    if time.time() < cells.end:
        for key in cells.pending([f"{variant} batch={batch}" for batch in batches]):
            cells.put(key, {"failed": fault})

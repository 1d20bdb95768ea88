"""Part `serve`: Llama-2-7B's shape end to end in vLLM, random weights, each method in a process.

The paper's setting: 2048 tokens in, 256 out, batch 1 to 64 (Tables 2 and 3, Figure 3). One engine a
method, compiled and with CUDA graphs; a cell is one method and one batch.
"""

import time
from typing import Any

from benchmarks.common.child_findings import run_child
from benchmarks.gpu.context import Context

DEFAULT_METHODS = ("bf16", "mergequant", "marlin-w4a16", "int8", "fp8")
BATCHES = (1, 8, 16, 32, 64)
MODEL, PREFILL, DECODE = "Llama-2-7B", 2048, 256
SMOKE_BATCHES = (1, 2)
METHOD_SECONDS = 240.0  # what one method may take at most; 90 are expected


def foreign(key: str) -> bool:
    """Whether a cell has nothing of ours in it."""
    return not key.startswith("mergequant")


def run(context: Context) -> None:
    """Start one process for each method that has a batch to measure."""
    options = context.options
    methods = options.get("methods") or DEFAULT_METHODS
    batches = options.get("batches") or (SMOKE_BATCHES if context.smoke else BATCHES)
    for method in methods:
        keys = {f"{method} batch={batch}": batch for batch in batches}
        wanted = [keys[key] for key in context.cells.pending(keys)]
        if wanted:
            context.cells.check_time()
            _run_method(context, method, wanted)


def _run_method(context: Context, method: str, batches: list[int]) -> None:
    cells = context.cells
    left = min(METHOD_SECONDS, cells.end - time.time())
    arguments = ["--method", method, "--model", "tiny" if context.smoke else MODEL]
    arguments += ["--batches", *map(str, batches), "--end", str(time.time() + left)]
    sizes = (16, 4) if context.smoke else (PREFILL, DECODE)
    arguments += ["--prefill", str(sizes[0]), "--decode", str(sizes[1])]
    if context.options.get("attention"):
        arguments += ["--attention", context.options["attention"]]
    if context.smoke:
        arguments += ["--eager"]

    def found(batch: str, record: dict[str, Any]) -> None:
        cells.put(f"{method} batch={batch}", record)
        if "whole_seconds" in record:
            print(f"  {method} batch {batch}: {record['whole_seconds']:.2f} s", flush=True)

    log = context.folder / f"serve-{method.replace(':', '-').replace('+', '-')}.log"
    fault = run_child("benchmarks.gpu.serve.child", arguments, found, left + 30, log)
    if fault is None:
        return
    print(f"  {method}: {fault}", flush=True)
    if time.time() < cells.end:
        for key in cells.pending([f"{method} batch={batch}" for batch in batches]):
            cells.put(key, {"failed": fault})

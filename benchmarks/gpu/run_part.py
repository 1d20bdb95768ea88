"""One part from beginning to end, in this process: cells, table, goals, files."""

import importlib
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.device import find_device, headline, kernel_sources, stamp, where
from benchmarks.common.goals import lines
from benchmarks.common.result_cells import Cells, DeadDeviceError, OutOfTime, write_atomically
from benchmarks.gpu.context import Context

# Part: module that runs it, module of its table and goals.
MODULES = {
    "exact": ("exact.measure", "exact.measure"),
    "gemm": ("gemm.measure", "gemm.table"),
    "quantize": ("quantize.measure", "quantize.table"),
    "trace": ("trace.measure", "trace.table"),
    "serve": ("serve.measure", "serve.table"),
}

# Exit statuses of a part.
PASSED, WRONG, UNFINISHED, DIED = 0, 1, 3, 75


def run_part(part: str, results: Path, command: str, run: str, end: float, **options: Any) -> int:
    """Run `part` until it is done or `end` (`time.time()`) has passed; returns an exit status.

    Args:
        results: folder that holds a folder for each device.
        command: to be written beside the results.
        run: name of this command's run, the same after a restart.
        options: `smoke`, `again` and what parts ask for.
    """
    device = find_device()
    smoke = bool(options.get("smoke"))
    if smoke and not device.is_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is built
    runner, reporter = (importlib.import_module(f"benchmarks.gpu.{name}") for name in MODULES[part])
    folder = results / device.folder
    folder.mkdir(parents=True, exist_ok=True)
    place = where(device)
    head = {"part": part, "command": command, **place}
    sources = kernel_sources()
    cells = Cells(
        folder / f"{part}.json",
        head,
        stamp(place, sources),
        end,
        again=bool(options.get("again")),
        run=run,
        foreign=getattr(runner, "foreign", lambda key: False),
        foreign_stamp=stamp(place, ()),
    )
    cells.record_interrupted()
    status = PASSED
    try:
        with torch.no_grad():
            runner.run(Context(device, cells, smoke, folder, options))
    except OutOfTime:
        status = UNFINISHED
    except DeadDeviceError as death:
        print(f"  the GPU's context is lost ({death}); a new process goes on", flush=True)
        status = DIED
    report(part, reporter, cells)
    if status == PASSED and hasattr(reporter, "passed") and not reporter.passed(cells):
        status = WRONG
    print(f"{part}: {cells.computed} cells measured now, {len(cells.done)} in all", flush=True)
    return status


def report(part: str, reporter: Any, cells: Cells) -> None:
    """Write `PART.md` from the cells and print the goals."""
    head = cells.head
    text = [headline(head)]
    text.append(f"`{head['command']}`")
    stale = sum(not cells.is_current(key) for key in cells.done)
    if stale:
        text.append(f"{stale} cells are of other versions or other kernel sources than the rest.")
    if hasattr(reporter, "goals"):
        goals = lines(reporter.goals(cells))
        text.append(f"Goals:\n\n{goals}")
        print(goals, flush=True)
    if hasattr(reporter, "summary"):
        print(reporter.summary(cells), flush=True)
    text.append(reporter.table(cells))
    write_atomically(cells.path.with_suffix(".md"), "\n\n".join(text) + "\n")

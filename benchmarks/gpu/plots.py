"""Plots from the results on disk: `python -m benchmarks.gpu plots [--results FOLDER]`.

Needs matplotlib; needs no GPU, so that results may be drawn on another machine.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.result_cells import Cells
from benchmarks.gpu.gemm.baselines import BF16
from benchmarks.gpu.gemm.table import derive, products
from benchmarks.gpu.quantize.table import times
from benchmarks.gpu.serve.table import BASE, by_variant, speedups
from benchmarks.gpu.trace.table import total


def draw_all(results: Path) -> list[Path]:
    """Draw what there is below `results`; returns the files."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("matplotlib is not installed: no plots; the JSON files have all figures", flush=True)
        return []
    mpl.use("Agg")
    drawn: list[Path] = []
    for part, draw in _PLOTS.items():
        for path in sorted(results.glob(f"*/{part}.json")):
            drawn += draw(read_cells(path), path)
    for path in drawn:
        print(path, flush=True)
    return drawn


def read_cells(path: Path) -> Cells:
    """The cells of a file, to be looked at."""
    head = json.loads(path.read_text())
    head.pop("cells")
    return Cells(path, head, "", 0.0, again=False, run="")


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _finish(figure: Any, axes: Any, path: Path) -> Path:
    from matplotlib import pyplot

    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _gemm(cells: Cells, path: Path) -> list[Path]:
    """Draw for each shape the speed of every subject against bf16, over M."""
    limits = cells.records().get("limits")
    shapes: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for key, cell in products(cells):
        title = key.rpartition(" M=")[0]
        for name, row in derive(cell, limits).items():
            if row[BF16] == row[BF16]:
                shapes.setdefault(title, {}).setdefault(name, []).append((cell["m"], row[BF16]))
    files = []
    for title, lines in shapes.items():
        device = cells.head["device"]
        figure, axes = _figure(f"{title}, {device}", "tokens", f"speed against {BF16}")
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        file = path.with_name(f"gemm-{title.replace(' ', '-')}.png")
        files.append(_finish(figure, axes, file))
    return files


def _quantize(cells: Cells, path: Path) -> list[Path]:
    """Microseconds over tokens."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for cell in cells.records().values():
        for name, us in times(cell).items():
            lines.setdefault(name, []).append((cell["m"], us))
    figure, axes = _figure(f"norm and quantization, {cells.head['device']}", "tokens", "us")
    for name, points in lines.items():
        style = {"compiled": "-", "eager": "--"}.get(name.split()[0], ":")
        axes.plot(*zip(*sorted(points), strict=True), style, marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    return [_finish(figure, axes, path.with_name("quantize-us.png"))]


def _trace(cells: Cells, path: Path) -> list[Path]:
    """Kernels a block."""
    records = cells.records()
    figure, axes = _figure(f"kernels a block, {cells.head['device']}", "", "decode")
    bars = axes.bar(list(records), [total(cell["decode"]) for cell in records.values()])
    axes.bar_label(bars, fmt="%g")
    axes.tick_params(axis="x", rotation=30)
    return [_finish(figure, axes, path.with_name("trace-kernels.png"))]


def _serve(cells: Cells, path: Path) -> list[Path]:
    """Speedups over bf16 by batch: prefill, decode, end to end."""
    variants = by_variant(cells)
    files = []
    for what in ("prefill", "decode", "end to end"):
        title = f"{what}, {cells.head['device']}"
        figure, axes = _figure(title, "batch", f"speedup over {BASE}")
        for name, batches in variants.items():
            points = {
                batch: speedups(cell, variants.get(BASE, {}).get(batch)).get(what)
                for batch, cell in sorted(batches.items())
            }
            shown = {str(batch): ratio for batch, ratio in points.items() if ratio is not None}
            axes.plot(list(shown), list(shown.values()), marker="o", label=name)
        files.append(_finish(figure, axes, path.with_name(f"serve-{what.replace(' ', '-')}.png")))
    return files


_PLOTS: dict[str, Callable[[Cells, Path], list[Path]]] = {
    "gemm": _gemm,
    "quantize": _quantize,
    "trace": _trace,
    "serve": _serve,
}

"""Tables and goals of part `gemm`."""

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.common.goals import Goal, worst
from benchmarks.common.result_cells import Cells, Record
from benchmarks.gpu.gemm.baselines import BASELINES, BF16, INT8, MARLIN

DECODE_SHARE = 0.8  # of the measured bandwidth, packed weights alone counted, M <= 16
PREFILL_RATIO = 0.9  # of cutlass_scaled_mm INT8's speed, M >= 2048

HEAD = """\
GEMM alone; activations are codes already. CUDA graphs replayed between events where the timer says
`graph`; median of the rounds, spread = (slowest - fastest round) / median. Weights are cycled so
that they come from memory. GB/s counts weights as stored plus activations in and out; *limit* is
the larger of bytes over measured copy bandwidth and operations over the best measured large product
of the same arithmetic, as a share of the time taken. Ratios above 1: faster than that baseline."""


def products(cells: Cells) -> Iterator[tuple[str, Record]]:
    """Cells of shapes, without `limits`."""
    for key, cell in cells.records().items():
        if "subjects" in cell:
            yield key, cell


def derive(cell: Record, limits: Record | None) -> dict[str, dict[str, Any]]:
    """Rates, share of the limit and ratios of every subject of a cell that ran."""
    subjects = cell["subjects"]
    derived: dict[str, dict[str, Any]] = {}
    for name, result in subjects.items():
        if "us" not in result:
            continue
        seconds = result["us"] * 1e-6
        moved = result["weight_bytes"] + result["activation_bytes"]
        row = {
            "us": result["us"],
            "spread": (result["high"] - result["low"]) / result["us"] if result["us"] else 0.0,
            "tops": result["operations"] / seconds / 1e12,
            "gbs": moved / seconds / 1e9,
            "limit": None,
            "weights_of_bandwidth": None,
            "timer": result["timer"],
        }
        if limits is not None:
            floors = [moved / limits["bandwidth"]]
            peak = limits.get(result["arithmetic"])
            floors += [result["operations"] / peak] if peak else []
            row["limit"] = max(floors) / seconds
            row["weights_of_bandwidth"] = result["weight_bytes"] / limits["bandwidth"] / seconds
        for baseline in (BF16, MARLIN, INT8):
            row[baseline] = subjects.get(baseline, {}).get("us", float("nan")) / result["us"]
        derived[name] = row
    return derived


def best_of_ours(derived: dict[str, dict[str, Any]]) -> str | None:
    """The fastest of our kernels."""
    ours = [name for name in derived if name not in BASELINES]
    return min(ours, key=lambda name: float(derived[name]["us"]), default=None)


def goals(cells: Cells) -> list[Goal]:
    """Decode near the bandwidth, prefill near INT8; the fastest of our kernels in each cell."""
    limits = cells.records().get("limits")
    decode: dict[str, float] = {}
    prefill: dict[str, float] = {}
    for key, cell in products(cells):
        derived = derive(cell, limits)
        name = best_of_ours(derived)
        if name is None:
            continue
        where = f"{key}, {name}"
        share = derived[name]["weights_of_bandwidth"]
        if cell["m"] <= 16 and share is not None:
            decode[where] = share
        if cell["m"] >= 2048 and INT8 in derived:
            prefill[where] = derived[name][INT8]
    return [
        worst("decode GEMM (M <= 16), packed weights / time / bandwidth", DECODE_SHARE, decode),
        worst("prefill GEMM (M >= 2048), speed against cutlass INT8", PREFILL_RATIO, prefill),
    ]


def table(cells: Cells) -> str:
    """Markdown: limits, the fastest kernels, medians over the shapes, every cell."""
    limits = cells.records().get("limits")
    lines = [HEAD, "", _limits_line(limits), "", *_medians(cells, limits), ""]
    for key, cell in products(cells):
        lines += [f"### {key} (N={cell['n']}, K={cell['k']})", "", *_cell_table(cell, limits), ""]
    return "\n".join([*lines, *cells.troubles()])


def _limits_line(limits: Record | None) -> str:
    if limits is None:
        return "The machine's limits were not measured."
    text = f"Measured limits: copy {limits['bandwidth'] / 1e9:.0f} GB/s"
    for kind in ("bf16", "int8", "fp8"):
        if limits.get(kind):
            text += f", {kind} {limits[kind] / 1e12:.0f} T operations/s"
    return text + "."


def _medians(cells: Cells, limits: Record | None) -> list[str]:
    """Per M: our fastest kernel in each shape, and medians over the shapes."""
    by_m: dict[int, list[dict[str, dict[str, Any]]]] = {}
    for _, cell in products(cells):
        by_m.setdefault(cell["m"], []).append(derive(cell, limits))
    lines = [
        f"| M | fastest of ours (shapes won) | / {BF16} | / {MARLIN} | / {INT8} |",
        "|---|---|---|---|---|",
    ]
    for m, shapes in sorted(by_m.items()):
        won: dict[str, int] = {}
        ratios: dict[str, list[float]] = {BF16: [], MARLIN: [], INT8: []}
        for derived in shapes:
            name = best_of_ours(derived)
            if name is None:
                continue
            won[name] = won.get(name, 0) + 1
            for baseline, values in ratios.items():
                values += [derived[name][baseline]] if baseline in derived else []
        winners = ", ".join(f"{name} ({n})" for name, n in sorted(won.items()))
        columns = " | ".join(
            f"{statistics.median(values):.2f}" if values else "-" for values in ratios.values()
        )
        lines.append(f"| {m} | {winners} | {columns} |")
    return lines


def _cell_table(cell: Record, limits: Record | None) -> list[str]:
    lines = [
        f"| | us | spread | TOP/s | GB/s | limit | / {BF16} | / {MARLIN} | / {INT8} | timer |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    derived = derive(cell, limits)
    for name, result in cell["subjects"].items():
        if name not in derived:
            lines.append(f"| {name} | {result.get('refused') or 'FAILED: ' + result['failed']} |")
            continue
        row = derived[name]
        limit = "-" if row["limit"] is None else f"{row['limit']:.0%}"
        ratios = " | ".join(
            f"{row[baseline]:.2f}" if baseline in derived else "-"
            for baseline in (BF16, MARLIN, INT8)
        )
        lines.append(
            f"| {name} | {row['us']:.1f} | {row['spread']:.0%} | {row['tops']:.1f} | "
            f"{row['gbs']:.0f} | {limit} | {ratios} | {row['timer']} |"
        )
    return lines

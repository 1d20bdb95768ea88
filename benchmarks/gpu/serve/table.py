"""Tables and goals of part `serve`."""

from typing import Any

from benchmarks.common.goals import Goal, worst
from benchmarks.common.result_cells import Cells, Record
from benchmarks.common.served_variants import base_name
from benchmarks.gpu.paper import (
    DECODE_SPEEDUP,
    END_TO_END_SPEEDUP,
    MEMORY_GB,
    MEMORY_SAVING,
    PREFILL_SPEEDUP,
)

PREFILL, DECODE_AT_ONE, END_TO_END = 1.7, 2.5, 2.06
MARLIN_SMALL, MARLIN_LARGE, MARLIN_PREFILL, MEMORY = 0.95, 1.0, 1.5, 3.3
BASE, MARLIN, OURS = "bf16", "marlin-w4a16", "mergequant"
SEQUENCE = 2049  # Table 3: one token after 2048

HEAD = f"""\
Llama-2-7B's shape, random weights, vLLM in one process without prefix caching, compiled and with
CUDA graphs. Prefill: until all sequences have their first token; decode: the rest. Speedups are
against {BASE} at the same batch. The paper's figures are of an RTX 3090, its speedups over FP16."""


def by_variant(cells: Cells) -> dict[str, dict[int, Record]]:
    """Figures by variant and batch."""
    figures: dict[str, dict[int, Record]] = {}
    for key, cell in cells.records().items():
        figures.setdefault(key.rpartition(" batch=")[0], {})[int(cell["batch"])] = cell
    return figures


def speedups(cell: Record, base: Record | None) -> dict[str, float]:
    """Prefill, decode and end to end against another variant at the same batch."""
    if base is None:
        return {}
    decode = cell["decode_tokens_per_second"] / base["decode_tokens_per_second"]
    return {
        "prefill": base["prefill_seconds"] / cell["prefill_seconds"],
        "decode": decode,
        "end to end": base["whole_seconds"] / cell["whole_seconds"],
    }


def sequence_bytes(cell: Record) -> float | None:
    """Peak memory with a cache for one sequence of the paper's Table 3."""
    if "peak_without_cache_bytes" not in cell:
        return None
    return float(cell["peak_without_cache_bytes"] + SEQUENCE * cell["cache_bytes_per_token"])


def goals(cells: Cells) -> list[Goal]:
    """Goals for `mergequant`, and for each kernel that was asked for by name."""
    variants = by_variant(cells)
    goals = []
    names = [name for name in variants if base_name(name) == OURS] or [OURS]
    for name in names:
        ours = variants.get(name, {})
        goals += _against_base(name, ours, variants.get(BASE, {}))
        goals += _against_marlin(name, ours, variants.get(MARLIN, {}))
    return goals


def _against_base(name: str, ours: dict[int, Record], base: dict[int, Record]) -> list[Goal]:
    ratios = {batch: speedups(cell, base.get(batch)) for batch, cell in ours.items()}
    ratios = {batch: ratio for batch, ratio in ratios.items() if ratio}
    prefill = {f"batch {batch}": ratio["prefill"] for batch, ratio in ratios.items()}
    best = max(ratios, key=lambda batch: ratios[batch]["end to end"], default=None)
    saving = None
    if 1 in ours and 1 in base:
        small, large = sequence_bytes(ours[1]), sequence_bytes(base[1])
        saving = large / small if small and large else None
    return [
        worst(f"{name}: prefill speedup over {BASE}", PREFILL, prefill),
        Goal(
            f"{name}: decode speedup over {BASE} at batch 1",
            DECODE_AT_ONE,
            ratios.get(1, {}).get("decode"),
        ),
        Goal(
            f"{name}: end to end speedup over {BASE}, the largest as in the paper",
            END_TO_END,
            None if best is None else ratios[best]["end to end"],
            detail=f"batch {best}",
        ),
        Goal(
            f"{name}: peak memory at batch 1 and sequence 2048, times below {BASE}",
            MEMORY,
            saving,
            detail="with a cache for one sequence",
        ),
    ]


def _against_marlin(name: str, ours: dict[int, Record], marlin: dict[int, Record]) -> list[Goal]:
    ratios = {batch: speedups(cell, marlin.get(batch)) for batch, cell in ours.items()}
    ratios = {batch: ratio for batch, ratio in ratios.items() if ratio}

    def pick(what: str, least: int, most: int) -> dict[str, float]:
        chosen = {batch: ratio for batch, ratio in ratios.items() if least <= batch <= most}
        return {f"batch {batch}": ratio[what] for batch, ratio in chosen.items()}

    large = 2**30
    return [
        worst(
            f"{name}: decode speed over {MARLIN}, batch 1 to 8", MARLIN_SMALL, pick("decode", 1, 8)
        ),
        worst(
            f"{name}: decode speed over {MARLIN}, batch 32 on",
            MARLIN_LARGE,
            pick("decode", 32, large),
        ),
        worst(f"{name}: prefill speed over {MARLIN}", MARLIN_PREFILL, pick("prefill", 1, large)),
    ]


def table(cells: Cells) -> str:
    """Markdown: speeds, memory, the paper's figures, what failed."""
    variants = by_variant(cells)
    lines = [HEAD, ""]
    lines += [
        "| variant | batch | prefill tokens/s | decode tokens/s | whole, s | prefill | decode "
        "| end to end | kernels |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, batches in variants.items():
        for batch, cell in sorted(batches.items()):
            ratio = speedups(cell, variants.get(BASE, {}).get(batch))
            ratios = " | ".join(
                f"{ratio[what]:.2f}x" if ratio else "-"
                for what in ("prefill", "decode", "end to end")
            )
            kernels = ", ".join(sorted(set(cell["kernels"].values())))
            lines.append(
                f"| {name} | {batch} | {cell['prefill_tokens_per_second']:.0f} | "
                f"{cell['decode_tokens_per_second']:.0f} | {cell['whole_seconds']:.2f} | "
                f"{ratios} | {kernels} |"
            )
    lines += ["", *_memory(variants), "", *_paper(), ""]
    for name, batches in variants.items():
        settings = next(iter(batches.values())).get("settings", {})
        lines.append(f"- {name}: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    lines += ["", *cells.troubles()]
    return "\n".join(lines)


def _memory(variants: dict[str, dict[int, Record]]) -> list[str]:
    lines = [
        f"| batch 1, GiB | model | times below {BASE} | peak | peak, a cache of 2049 tokens alone "
        f"| times below {BASE} |",
        "|---|---|---|---|---|---|",
    ]
    base = variants.get(BASE, {}).get(1)
    for name, batches in variants.items():
        cell = batches.get(1)
        if cell is None:
            continue
        one, of_base = sequence_bytes(cell), sequence_bytes(base) if base else None
        times = f"{of_base / one:.2f}" if one and of_base else "-"
        model = f"{base['model_bytes'] / cell['model_bytes']:.2f}" if base else "-"
        lines.append(
            f"| {name} | {_gib(cell['model_bytes'])} | {model} | {_gib(cell.get('peak_bytes'))} | "
            f"{_gib(one)} | {times} |"
        )
    return lines


def _gib(size: Any) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}"


def _paper() -> list[str]:
    lines = ["The paper's Table 2, prefill speedup:", ""]
    lines += ["| batch | QuaRot | RTN | MergeQuant |", "|---|---|---|---|"]
    lines += [
        f"| {batch} | " + " | ".join(f"{x:.3f}x" for x in row) + " |"
        for batch, row in PREFILL_SPEEDUP.items()
    ]
    memory = ", ".join(
        f"{name} {size} GB ({MEMORY_SAVING[name]}x below FP16)" for name, size in MEMORY_GB.items()
    )
    lines += [
        "",
        f"Its Figure 3, the largest: decode {DECODE_SPEEDUP}x, end to end {END_TO_END_SPEEDUP}x. "
        f"Its Table 3: {memory}.",
    ]
    return lines

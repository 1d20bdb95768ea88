"""Tables and goals of part `quantize`."""

from benchmarks.common.goals import Goal, worst
from benchmarks.common.result_cells import Cells, Record
from benchmarks.gpu.paper import QUANTIZE_MS
from benchmarks.gpu.quantize.measure import PLAIN

FASTER_AT_ONE_TOKEN = 2.9  # the paper's Table 6 has 2.92

HEAD = """\
Microseconds, median of the rounds. Inputs are hot in the cache, as behind another kernel.
`compiled` and `eager` are replays of CUDA graphs; `plain` is PyTorch's own operations with
launching, the paper's Table 6 (RTX 3090, batch x sequence) beside it."""


def times(cell: Record) -> dict[str, float]:
    """Microseconds of the subjects that ran."""
    return {name: result["us"] for name, result in cell["subjects"].items() if "us" in result}


def goals(cells: Cells) -> list[Goal]:
    """Static rounding is free beside the norm; it beats dynamic quantization at one token."""
    goals = []
    for mode, dynamic in (("compiled", "norm + dynamic"), ("eager", "norm + dynamic")):
        free: dict[str, float] = {}
        faster: float | None = None
        plain: float | None = None
        for key, cell in cells.records().items():
            us = times(cell)
            alone, static = us.get(f"{mode} norm"), us.get(f"{mode} norm + static")
            if alone and static:
                free[key] = static / alone
            if cell["m"] != 1:
                continue
            slow = us.get(f"{mode} {dynamic}")
            faster = slow / static if slow and static else None
            if all(us.get(name) for name in PLAIN):
                plain = us[PLAIN[0]] / us[PLAIN[1]]
        goals += [
            worst(f"{mode}: time of norm + static over bf16 norm alone", 1.0, free, most=True),
            Goal(
                f"{mode}: norm + dynamic over norm + static at one token",
                FASTER_AT_ONE_TOKEN,
                faster,
            ),
        ]
    text = "plain PyTorch, without the norm, as the paper's Table 6: dynamic over reconstruction"
    return [*goals, Goal(f"{text} at one token", FASTER_AT_ONE_TOKEN, plain)]


def table(cells: Cells) -> str:
    """Markdown: a row a subject, a column a number of tokens."""
    records = sorted(cells.records().values(), key=lambda cell: int(cell["m"]))
    lines = [HEAD, ""]
    if records:
        columns = [str(cell["m"]) for cell in records]
        lines.append(f"| K={records[0]['k']}, tokens | " + " | ".join(columns) + " |")
        lines.append("|---|" + "---|" * len(columns))
        for name in records[0]["subjects"]:
            lines.append(
                f"| {name} | " + " | ".join(_figure(cell, name) for cell in records) + " |"
            )
        for place, name in ((2, "dynamic quantization"), (3, "dimension reconstruction")):
            lines.append(
                f"| paper: {name} | " + " | ".join(_paper(c, place) for c in records) + " |"
            )
    lines += ["", *_reasons(records)]
    lines += ["", *cells.troubles()]
    return "\n".join(lines)


def _figure(cell: Record, name: str) -> str:
    result = cell["subjects"].get(name, {})
    if "us" in result:
        return f"{result['us']:.1f} ({result['low']:.1f}-{result['high']:.1f})"
    return "refused" if "refused" in result else "FAILED"


def _paper(cell: Record, place: int) -> str:
    row = QUANTIZE_MS.get(cell["m"])
    return "-" if row is None else f"{float(row[place]) * 1000:.0f} ({row[0]} x {row[1]})"


def _reasons(records: list[Record]) -> list[str]:
    reasons: dict[str, None] = {}
    for cell in records:
        for name, result in cell["subjects"].items():
            for word in ("refused", "failed"):
                if word in result:
                    reasons[f"- {word.upper()} {name}: {result[word]}"] = None
    return list(reasons)

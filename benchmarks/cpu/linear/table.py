"""Table of part `linear`: speeds, ratios with quartiles, bounds, shares of quantizing."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cpu.instruction_sets import find_instruction_set
from benchmarks.cpu.linear.baselines import BASELINES
from benchmarks.cpu.linear.limits import FLOAT32_SHARE, Limits
from benchmarks.cpu.linear.measure import OURS, QUANTIZE, ROTATE
from benchmarks.cpu.linear.timing import ratio

Row = Mapping[str, Any]

HEAD = """\
The product alone, activations being codes, results in float32; ours is exact. Interleaved: each
round times every subject once, a ratio is formed within a round; median, in brackets the quartiles
of the ratios, then the ratio of each one's fastest round, which other users of a shared machine
disturb least. Above 1: ours is faster. Weights are cycled through copies that together have at
least {copied:.0f} MiB, four times the last-level cache of {cache:.0f} MiB, so that they come from
memory. G/s: 10^9 products (MAC) a second, median. Bound: the smaller of memory bandwidth for the
packed weights and the arithmetic of the instruction set ({why}). Every result was held against the
exact one before it was timed."""


def table(kernel: str, isa: str, limits: Limits, cache: int, rows: Sequence[Row]) -> str:
    """Tables in Markdown."""
    why = find_instruction_set(isa).why or "nothing is known about it"
    head = HEAD.format(copied=4 * cache / 2**20, cache=cache / 2**20, why=why)
    parts = [f"Ours: kernel `{kernel}`. {head}", limits_text(limits), summary(rows)]
    parts += [_speeds(limits, rows), _ratios(rows), _quantizing(rows), _notes(rows)]
    return "\n\n".join(part for part in parts if part)


def limits_text(limits: Limits) -> str:
    """Limits of the machine in words."""
    text = (
        f"Measured: {limits.bandwidth / 1e9:.1f} GB/s read from memory, {limits.float32 / 1e9:.1f} "
        "G/s of float32 products in the cache"
    )
    if limits.codes is None or limits.clock is None:
        return f"{text}; no bound of arithmetic is known for this instruction set."
    return (
        f"{text}; taken as {FLOAT32_SHARE:.0%} of the peak, that is a clock of "
        f"{limits.clock / 1e9:.2f} GHz and {limits.codes / 1e9:.0f} G/s of 4-bit products at most."
    )


def speed(row: Row, name: str) -> float | None:
    """Products a second, median; None if it did not run."""
    seconds = row["subjects"].get(name, {}).get("seconds")
    if not seconds:
        return None
    return float(row["m"] * row["n"] * row["k"] / statistics.median(seconds))


def against(row: Row, name: str) -> tuple[float, float, float] | None:
    """Median and quartiles of how many times faster ours is than `name`."""
    ours, theirs = (row["subjects"].get(key, {}).get("seconds") for key in (OURS, name))
    return ratio(ours, theirs) if ours and theirs else None


def fastest(row: Row, name: str) -> float | None:
    """How many times faster our fastest round is than that of `name`."""
    ours, theirs = (row["subjects"].get(key, {}).get("seconds") for key in (OURS, name))
    return min(theirs) / min(ours) if ours and theirs else None


def summary(rows: Sequence[Row]) -> str:
    """Summarize each M and baseline: shapes won; over shapes, medians and fastest rounds."""
    lines = [
        "| M | against | shapes won | least | median | most | fastest: least | median | most |",
        "|---" * 9 + "|",
    ]
    for m in dict.fromkeys(row["m"] for row in rows):
        for name in BASELINES:
            shapes = [row for row in rows if row["m"] == m]
            ratios = [x[0] for row in shapes if (x := against(row, name))]
            best = [x for row in shapes if (x := fastest(row, name))]
            if ratios:
                won = sum(value > 1 for value in ratios)
                cells = " | ".join((*_three(ratios), *_three(best)))
                lines.append(f"| {m} | {name} | {won} of {len(ratios)} | {cells} |")
    return "\n".join(lines)


def _three(values: Sequence[float]) -> tuple[str, ...]:
    """Smallest, median and largest."""
    three = (min(values), statistics.median(values), max(values))
    return tuple(f"{value:.2f}" for value in three)


def _speeds(limits: Limits, rows: Sequence[Row]) -> str:
    names = (OURS, *BASELINES)
    lines = [f"| G/s | M | bound | of it | {' | '.join(names)} |", "|---" * (len(names) + 4) + "|"]
    for row in rows:
        ours, bound = speed(row, OURS), None
        if row["packed_bytes"]:
            bound = limits.bound(row["m"] * row["n"] * row["k"], row["packed_bytes"])
        share = "-" if ours is None or bound is None else f"{ours / bound:.0%}"
        cells = [_giga(bound), share, *(_giga(speed(row, name)) for name in names)]
        lines.append(f"| {_title(row)} | {row['m']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratios(rows: Sequence[Row]) -> str:
    lines = [f"| ours against | M | {' | '.join(BASELINES)} |", "|---" * (len(BASELINES) + 2) + "|"]
    for row in rows:
        cells = (_spread(against(row, name), fastest(row, name)) for name in BASELINES)
        lines.append(f"| {_title(row)} | {row['m']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _quantizing(rows: Sequence[Row]) -> str:
    """Table of the time to quantize each token, as a share of the product that follows."""
    lines = [f"| share of ours | M | {QUANTIZE} | {ROTATE} |", "|---|---|---|---|"]
    for row in rows:
        if QUANTIZE not in row["subjects"]:
            continue
        ours = row["subjects"][OURS].get("seconds")
        cells = []
        for name in (QUANTIZE, ROTATE):
            theirs = row["subjects"][name].get("seconds")
            share = ratio(ours, theirs)[0] if ours and theirs else None
            cells.append("-" if share is None else f"{share:.1%}")
        lines.append(f"| {_title(row)} | {row['m']} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _notes(rows: Sequence[Row]) -> str:
    lines = [f"- {name}: {baseline.what}." for name, baseline in BASELINES.items()]
    for row in rows:
        for name, result in row["subjects"].items():
            for word in ("refused", "failed"):
                if word in result:
                    lines.append(f"- {word.upper()} {name}, {_title(row)}: {result[word]}")
    return "\n".join(dict.fromkeys(lines))


def _title(row: Row) -> str:
    return f"{row['title']} {row['n']}x{row['k']}"


def _giga(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:.1f}"


def _spread(quartiles: tuple[float, float, float] | None, best: float | None) -> str:
    if quartiles is None or best is None:
        return "-"
    return f"{quartiles[0]:.2f} ({quartiles[1]:.2f}-{quartiles[2]:.2f}), {best:.2f}"


def lines_of(rows: Sequence[Row]) -> str:
    """Rows as they are printed while the part runs."""
    lines = []
    for row in rows:
        speeds = (f"{name} {_giga(speed(row, name))}" for name in (OURS, *BASELINES))
        lines.append(f"  {_title(row)} M={row['m']}, G/s: {', '.join(speeds)}")
    return "\n".join(lines)

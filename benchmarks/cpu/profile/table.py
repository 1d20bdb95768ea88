"""Table of part `profile`."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cpu.profile.measure import (
    ATTENTION,
    CALLS,
    ELEMENTWISE,
    EMBEDDING,
    HEAD,
    LINEARS,
    NORMS,
    OPERATORS,
    PYTHON,
    TOKENS,
)

ORDER = (
    LINEARS,
    TOKENS,
    NORMS,
    ELEMENTWISE,
    ATTENTION,
    HEAD,
    EMBEDDING,
    CALLS,
    OPERATORS,
    PYTHON,
)
TEXT = """\
ms of one prefill and of one decoded token at batch 1, and its share; operators' own time. The
compiler joins the embedding with the first norm, and static rounding with the norm before it."""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; groups that took no time are left out."""
    titles = [f"{row['phase']}, ms | share" for row in rows]
    lines = [TEXT, "", f"| | {' | '.join(titles)} |", "|---" * (2 * len(rows) + 1) + "|"]
    for name in ORDER:
        taken = [row["groups"].get(name, 0.0) for row in rows]
        if not any(seconds > 0 for seconds in taken):
            continue
        cells = [_cell(seconds, row) for seconds, row in zip(taken, rows, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for key, title in (("profiled", "together"), ("seconds", "without the profiler")):
        cells = [f"{row[key] * 1e3:.2f} | " for row in rows]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(seconds: float, row: Mapping[str, Any]) -> str:
    return f"{seconds * 1e3:.2f} | {seconds / row['profiled']:.1%}"

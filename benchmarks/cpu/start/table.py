"""Table of part `start`."""

from collections.abc import Mapping, Sequence
from typing import Any

HEAD = """\
`vllm serve {what}`, context of 1024, {cache} GiB of key-value cache: seconds from the command
until it answers (/health), and until the first token of a prompt of 16. First start: empty caches
of compiled code; second: the same caches. Memory: of all its processes after that token, shared
pages counted once, MiB."""


def table(what: str, cache: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Seconds and memory of each start, in Markdown."""
    lines = ["| | start | answers, s | first token, s | memory, MiB |", "|---|---|---:|---:|---:|"]
    for row in rows:
        times = f"{row['ready']:.1f} | {row['first_token']:.1f}"
        memory = f"{row['resident'] / 2**20:.0f}"
        lines.append(f"| {row['name']} | {row['start']} | {times} | {memory} |")
    return "\n\n".join((HEAD.format(what=what, cache=cache), "\n".join(lines)))

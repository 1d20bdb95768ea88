"""Tables of part `trace`."""

from benchmarks.common.result_cells import Cells, Record

HEAD = """\
Kernels of one decoder block in one forward pass, memory copies left out: half the difference
between models of 4 and 2 blocks. `compiled` is vLLM's default without CUDA graphs, which replay the
same kernels. A name counted less than once a block is one that the compiler numbered anew."""
LONGEST_NAME = 110


def total(counts: dict[str, float]) -> float:
    """Kernels in all."""
    return sum(counts.values())


def table(cells: Cells) -> str:
    """Markdown: totals, then every name."""
    records = cells.records()
    lines = [HEAD, "", "| | decode | prefill | linears |", "|---|---|---|---|"]
    for key, cell in records.items():
        kernels = ", ".join(sorted(set(cell["kernels"].values())))
        lines.append(
            f"| {key} | {total(cell['decode']):g} | {total(cell['prefill']):g} | {kernels} |"
        )
    for key, cell in records.items():
        lines += ["", f"### {key}", "", *_names(cell)]
    lines += ["", *cells.troubles()]
    return "\n".join(lines)


def _names(cell: Record) -> list[str]:
    lines = ["| decode | prefill | kernel |", "|---|---|---|"]
    names = sorted({**cell["prefill"], **cell["decode"]})
    for name in names:
        shown = name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "..."
        decode, prefill = cell["decode"].get(name, 0), cell["prefill"].get(name, 0)
        lines.append(f"| {decode:g} | {prefill:g} | `{shown}` |")
    return lines

"""`mergequant report`: one page about a run, without scripts, that needs nothing beside it."""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergequant.errors import InputError
from mergequant.evaluate.checkpoint_contents import Contents, inspect_checkpoint
from mergequant.evaluate.compare import RESULTS
from mergequant.model.reader import locate
from mergequant.output import run_figures as figures
from mergequant.output.durable_files import write_durably
from mergequant.output.writer import REPORT

PAGE = "report.html"
_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .2em .8em; border-bottom: 1px solid #ccc; }
td { text-align: right; } td:first-child, th:first-child { text-align: left; }
"""


def write_report(checkpoint: str | Path, page: Path | None = None) -> Path:
    """Write a page about the run that made a checkpoint.

    Args:
        checkpoint: its folder or hub id.
        page: file to write; by default `report.html` in the folder.

    Returns:
        the page.

    Raises:
        InputError: there is no such checkpoint, or it has lost its report.
    """
    figures.require_matplotlib()
    folder = locate(checkpoint)
    contents = inspect_checkpoint(folder)
    text = "".join(_page(folder, contents, read_report(folder)))
    target = page or folder / PAGE
    write_durably(target, lambda path: path.write_text(text, encoding="utf-8"))
    return target


def read_report(folder: Path) -> list[dict[str, Any]]:
    """The lines of a checkpoint's `quantization_report.jsonl`."""
    file = folder / REPORT
    if not file.is_file():
        raise InputError(f"{folder} has no {REPORT}: it is written by `mergequant quantize`.")
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error}): quantize the model again.") from error


def _page(folder: Path, contents: Contents, lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    title = html.escape(f"{folder.resolve().name}: how it was quantized")
    yield f"<!DOCTYPE html>\n<html lang='en'>\n<head><meta charset='utf-8'><title>{title}</title>\n"
    yield f"<style>\n{_STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n"
    yield _summary(contents)
    yield from _evaluation(folder)
    named = {x.name: (x.weight_bits, x.activation_bits) for x in contents.linears}
    for heading, drawn in (
        ("Loss of each linear", figures.losses(lines)),
        ("Training of each block", figures.training(lines)),
        ("Bits", figures.bits(named)),
        ("Clip ratios", figures.clips(lines)),
        ("Outlier channels", figures.outliers(lines)),
        ("Time", figures.seconds(lines)),
        ("Memory", figures.memory(lines)),
    ):
        if drawn is not None:
            yield f"<h2>{heading}</h2>\n{figures.svg(drawn)}\n"
    options = json.dumps(contents.provenance, indent=1)
    yield f"<h2>Options and versions</h2>\n<pre>{html.escape(options)}</pre>\n</body>\n</html>\n"


def _summary(contents: Contents) -> str:
    total, plain = contents.bytes_total / 1e6, contents.bytes_16_bit / 1e6
    return (
        f"<p>{len(contents.linears)} linears are quantized, {len(contents.plain)} are not. The "
        f"weights take {total:.1f} MB, {total / plain:.2f} of the {plain:.1f} MB of 16 bits.</p>\n"
    )


def _evaluation(folder: Path) -> Iterator[str]:
    file = folder / RESULTS
    if not file.is_file():
        return
    yield "<h2>Evaluation</h2>\n<table><tr><th></th><th>base</th><th>quantized</th>"
    yield "<th>recovery, %</th></tr>\n"
    for row in json.loads(file.read_text()):
        cells = [row["what"], *(f"{row[x]:.2f}" for x in ("base", "quantized", "recovery"))]
        yield "".join(("<tr>", *(f"<td>{html.escape(x)}</td>" for x in cells), "</tr>\n"))
    yield "</table>\n"

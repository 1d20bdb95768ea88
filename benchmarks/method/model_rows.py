"""Rows about one pretrained model: their losses on the same texts, measured one after the other.

Each row that is finished is written, so that an interrupted run goes on with the next.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmarks.common.record import RESULTS, environment, save

FULL = "full precision"


class ModelRow(Protocol):
    """A dataclass with these fields among others.

    Attributes:
        name: the row's.
        loss: nats a token, by text.
        excess: the same above full precision.
    """

    @property
    def name(self) -> str:
        """The row's name."""

    @property
    def loss(self) -> dict[str, float]:
        """Nats a token, by text."""

    @property
    def columns(self) -> set[str]:
        """What was measured of it: texts, and what else it has."""

    @property
    def excess(self) -> dict[str, float]:
        """The same above full precision."""


_TEXT = " --text "  # what of a command stands behind it may grow
_LATER = "loss on each; a row measured before a text was named has none there"

Kind = TypeVar("Kind", bound=ModelRow)


def add_arguments(parser: argparse.ArgumentParser, rows: Sequence[str], samples: str) -> None:
    """Add the model, the texts, the rows and the windows; `samples` says what these are for."""
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help=_LATER)
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows)
    parser.add_argument("--length", type=int, default=1024, help="tokens in an evaluated window")
    parser.add_argument("--windows", type=int, default=16, help="windows evaluated of each text")
    parser.add_argument("--samples", type=int, default=64, help=samples)
    parser.add_argument("--sequence", type=int, default=512, help="tokens in such a window")


def command_of(module: str, given: argparse.Namespace, *flags: str) -> str:
    """The command that measures the same, without folders: it is written beside the figures.

    Args:
        module: of the benchmark.
        given: what `add_arguments` read.
        flags: further ones that are numbers.
    """
    numbers = " ".join(
        f"--{flag} {getattr(given, flag)}"
        for flag in ("length", "windows", "samples", "sequence", *flags)
    )
    return (
        f"python -m {module} {given.model.resolve().name} {numbers} "
        f"--calibration {names(given.calibration)}{_TEXT}{names(given.text)}"
    )


def names(files: Sequence[Path]) -> str:
    """The files as a command names them, without folders."""
    return " ".join(file.name for file in files)


def measure_all(
    name: str,
    command: str,
    wanted: Sequence[str],
    columns: set[str],
    order: Iterable[str],
    kind: type[Kind],
    measure: Callable[[str], Kind],
    table: Callable[[list[Kind]], str],
) -> None:
    """Measure the wanted rows that are not known yet, and full precision; write all after each.

    Args:
        name: of the result files.
        columns: what the command measures of each row; all that the file has must be among them.
        order: names of all rows, as they stand in the table.
        kind: class of a row.
    """
    rows = known(RESULTS / f"{name}.json", command, kind)
    if dropped := sorted({column for row in rows for column in row.columns} - columns):
        raise SystemExit(f"Rows of {name}.json have {', '.join(dropped)}: name these files too.")
    rows = [row for row in rows if row.name != FULL or row.columns >= columns]
    for row in dict.fromkeys([FULL, *wanted]):
        if row in {x.name for x in rows}:
            continue
        rows = with_excess([*rows, measure(row)], order)
        save(name, command, [_as_json(x) for x in rows], table(rows), environment(), RESULTS)
        print(table(rows), flush=True)


def known(file: Path, command: str, kind: type[Kind]) -> list[Kind]:
    """The rows that an earlier run of the same command finished, on these texts or others."""
    if not file.exists():
        return []
    record = json.loads(file.read_text())
    same = record["command"].split(_TEXT)[0] == command.split(_TEXT)[0]
    return [kind(**row) for row in record["rows"]] if same else []


def with_excess(rows: Sequence[Kind], order: Iterable[str]) -> list[Kind]:
    """The rows in `order`, with their loss above full precision."""
    full = next(row.loss for row in rows if row.name == FULL)
    places = {name: place for place, name in enumerate(order)}
    return [
        _replaced(row, excess={text: loss - full[text] for text, loss in row.loss.items()})
        for row in sorted(rows, key=lambda row: places[row.name])
    ]


def full_loss(rows: Sequence[ModelRow]) -> str:
    """A sentence: the loss in full precision, which is the first row."""
    losses = ", ".join(f"{text} {loss:.4f}" for text, loss in rows[0].loss.items())
    return f"Loss in full precision, nats a token: {losses}."


def _replaced(row: Any, **fields: Any) -> Any:
    return replace(row, **fields)


def _as_json(row: Any) -> dict[str, Any]:
    return asdict(row)

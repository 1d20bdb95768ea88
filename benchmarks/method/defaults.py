"""What each default is worth: one option changed at a time, the others as they are.

    python -m benchmarks.method.defaults MODEL --calibration FILE [FILE ...] --text FILE

The first rows are quantized without compensation, which is cheap; the last ones with it. Each is
measured in the reference forward. Rows of `benchmarks/results/defaults-MODEL.json` that were made
by the same command are not run again, so an interrupted run goes on; the table is written beside.
"""

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.record import RESULTS, environment, save
from benchmarks.method.yardstick import Yardstick
from mergequant import Options

FAST: Mapping[str, Any] = {"compensation_rank": 0}
WITHOUT_COMPENSATION: tuple[Mapping[str, Any], ...] = (
    {},
    {"weight_search": "minmax"},
    {"weights": "rtn"},
    {"clipping": "channel"},
    {"clipping": "none"},
    {"reconstruction": "none"},
    {"split_by": "step"},
    {"staggered": False},
    {"rotation": "none"},
    {"rotation": "offline"},
    {"rotation": "online"},
    {"static_zero_points": False},
    {"dynamic_zero_points": True},
    {"input_correction": False},
    {"head_bits": 8},
)
WITH_COMPENSATION: tuple[Mapping[str, Any], ...] = (
    {},
    {"compensation_rank": 16},
    {"compensation_epochs": 4},
    {"weight_search": "minmax"},
    {"reconstruction": "none"},
    {"rotation": "none"},
    {"input_correction": False},
)


@dataclass(frozen=True)
class Row:
    """`excess`: loss above full precision, nats a token; `seconds`: to quantize."""

    compensated: bool
    changed: str
    excess: float
    seconds: float


def label(changes: Mapping[str, Any]) -> str:
    """The flags of the command line that make the change."""
    flags = []
    for name, value in changes.items():
        flag = name.replace("_", "-")
        flags.append(f"--no-{flag}" if value is False else f"--{flag} {value}")
    return " ".join(flags) or "the defaults"


def known(file: Path, command: str) -> list[Row]:
    """The rows that an earlier run of the same command finished."""
    if not file.exists():
        return []
    record = json.loads(file.read_text())
    return [Row(**row) for row in record["rows"]] if record["command"] == command else []


def table(rows: list[Row]) -> str:
    """Table in Markdown."""
    lines = ["| compensation | changed | excess loss | seconds |", "|---|---|---:|---:|"]
    for row in rows:
        on = "yes" if row.compensated else "no (`--fast`)"
        lines.append(f"| {on} | {row.changed} | {row.excess:+.4f} | {row.seconds:.0f} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What each default is worth.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=200, help="windows evaluated")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a window")
    parser.add_argument("--fast", action="store_true", help="leave the compensated rows out")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    model = given.model.resolve()
    texts = " ".join(file.name for file in given.calibration)
    command = (
        f"python -m benchmarks.method.defaults {model.name} --calibration {texts} --text "
        f"{given.text.name} --windows {given.windows} --length {given.length}"
    )
    name = f"defaults-{model.name}"
    rows = known(RESULTS / f"{name}.json", command)
    finished = {(row.compensated, row.changed) for row in rows}

    yardstick = Yardstick(model, given.text, given.length, given.windows)
    plan = [(False, changes) for changes in WITHOUT_COMPENSATION]
    plan += [(True, changes) for changes in WITH_COMPENSATION]
    order = [(compensated, label(changes)) for compensated, changes in plan]
    for compensated, changes in plan:
        if (compensated, label(changes)) in finished or (compensated and given.fast):
            continue
        options = Options.model_validate(
            {
                "head_bits": 16,  # what the rows tell apart is in the blocks
                **({} if compensated else FAST),
                "sequence_length": given.length,
                **changes,
            }
        )
        began = time.monotonic()
        quantized = yardstick.quantize(given.calibration, options)
        seconds = time.monotonic() - began
        rows.append(Row(compensated, label(changes), yardstick.excess(quantized.model), seconds))
        print(rows[-1], flush=True)
        rows.sort(key=lambda row: order.index((row.compensated, row.changed)))
        save(name, command, [asdict(row) for row in rows], table(rows), environment())


if __name__ == "__main__":
    main()

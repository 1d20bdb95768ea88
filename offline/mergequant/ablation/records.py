"""What is kept of finished rows: JSON files in OUTPUT, which is of one study and one process.

| file in OUTPUT        | meaning                                                                |
|-----------------------|------------------------------------------------------------------------|
| `lock`                | locked (flock) by the run that writes                                  |
| `study.json`          | what the rows have in common, see `Study`                              |
| `rows/KEY.json`       | a finished row, see `Record`                                           |
| `rows/KEY.error.txt`  | why a row failed                                                       |
| `checkpoints/KEY`     | the row's checkpoint, while it is made and measured, or if it is kept  |
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from mergequant.ablation.measure import Measured
from mergequant.ablation.study import Study
from mergequant.errors import InputError
from mergequant.output.durable_files import hold, write_json

_LOCK, _STUDY, _ROWS = "lock", "study.json", "rows"

logger = logging.getLogger("mergequant")


class Record(BaseModel):
    """A finished row.

    Attributes:
        options: see `Options`; None: full precision.
        measured: by engine, then by the text's name. Full precision is measured by every engine
            that measures a row; a row by one.
        accuracies: percent, by the task's name.
        growth: how much wider the norm-fed linears' input became by reconstruction, percent; their
            mean.
        seconds: `calibration`, `compensation`, `codes` as the report has them; `quantize`,
            `evaluate` by the clock, all of it.
        clips: ratio of each block, by the linear's name within its block; per-token linears only.
        device: what measured it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    options: dict[str, JsonValue] | None
    measured: dict[str, dict[str, Measured]]
    accuracies: dict[str, float]
    growth: float
    seconds: dict[str, float]
    clips: dict[str, list[float]]
    device: str


class Shelf:
    """The records in a folder, held by one process at a time; use `open_shelf`."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def read(self, key: str, options: dict[str, JsonValue] | None) -> Record | None:
        """The record of a finished row; None if there is none of these options."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            record = Record.model_validate_json(path.read_bytes())
        except ValidationError:
            logger.warning("%s is damaged: its row is run again", path)
            return None
        if record.options != options:
            logger.warning("%s was made with other options: its row is run again", path)
            return None
        return record

    def write(self, record: Record) -> None:
        """Declare a row finished."""
        write_json(self._path(record.key), record.model_dump(mode="json"))
        self._error(record.key).unlink(missing_ok=True)

    def write_error(self, key: str, trace: str) -> Path:
        """Keep why a row failed."""
        self._error(key).write_text(trace)
        return self._error(key)

    def checkpoint(self, key: str) -> Path:
        """Folder in which the row's checkpoint is made."""
        return self.output / "checkpoints" / key

    def _path(self, key: str) -> Path:
        return self.output / _ROWS / f"{key}.json"

    def _error(self, key: str) -> Path:
        return self.output / _ROWS / f"{key}.error.txt"


@contextmanager
def open_shelf(output: Path, study: Study) -> Iterator[Shelf]:
    """`output`, made if need be and locked; what is in it must be of the same study.

    Raises:
        InputError: another run holds it, or it holds rows of another study, or other files.
    """
    held = _acquire(output)
    try:
        _refuse_another(output, study)
        write_json(output / _STUDY, study.model_dump(mode="json"))
        yield Shelf(output)
    finally:
        os.close(held)


def _acquire(output: Path) -> int:
    if output.exists() and not output.is_dir():
        raise InputError(f"Output {output} is a file: choose another name.")
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if names - {_ROWS} and _LOCK not in names:  # a run that was killed at once left rows alone
        raise InputError(f"Output folder {output} holds other files: choose another or a new one.")
    try:
        (output / _ROWS).mkdir(parents=True, exist_ok=True)
        return hold(output / _LOCK, output)
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error}): choose another.") from error


def _refuse_another(output: Path, study: Study) -> None:
    path = output / _STUDY
    if not path.exists() or not any((output / _ROWS).glob("*.json")):
        return
    try:
        begun = Study.model_validate(json.loads(path.read_text()))
    except ValueError as error:  # a ValidationError is one
        raise InputError(
            f"{path} is damaged or of another release: choose another output, or remove {output}."
        ) from error
    difference = begun.difference(study)
    if difference:
        raise InputError(
            f"{output} holds rows made with {difference}: give the same again, or choose another "
            "output."
        )

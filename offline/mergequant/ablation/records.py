"""What is kept of a finished row, and of the study that it belongs to: JSON files in OUTPUT."""

import importlib.metadata
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

import mergequant_vllm
from mergequant.durable import HeldError, lock, write_json
from mergequant.errors import InputError

_LOCK, _STUDY, _ROWS = "lock", "study.json", "rows"
_LIBRARIES = ("torch", "transformers")

logger = logging.getLogger("mergequant")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Measured(_Strict):
    """Loss on one text: mean negative log-probability of a token, nats."""

    loss: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


class Record(_Strict):
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

    key: str
    options: dict[str, JsonValue] | None
    measured: dict[str, dict[str, Measured]]
    accuracies: dict[str, float]
    growth: float
    seconds: dict[str, float]
    clips: dict[str, list[float]]
    device: str


class Study(_Strict):
    """All that the rows of one OUTPUT have in common; rows of another study are not comparable.

    Attributes:
        versions: of the libraries that compute, by package.
        config_sha256: of the source model's configuration.
        weights_sha256: of each of its weight files, by name.
        calibration_sha256: of each calibration text, by name.
        texts_sha256: of each evaluated text's windows, by name.
        settings: engine, dtype, tasks.
    """

    versions: dict[str, str]
    config_sha256: str
    weights_sha256: dict[str, str]
    calibration_sha256: dict[str, str]
    texts_sha256: dict[str, str]
    settings: dict[str, JsonValue]

    def difference(self, given: "Study") -> str | None:
        """The first thing in which they differ, as a phrase; None if they agree."""
        if self.config_sha256 != given.config_sha256:
            return "another model's config.json"
        for field, what in (
            ("weights_sha256", "weights"),
            ("calibration_sha256", "calibration text"),
            ("texts_sha256", "evaluation text or windows"),
            ("settings", "setting"),
            ("versions", "release of"),
        ):
            ours, theirs = getattr(self, field), getattr(given, field)
            for name in sorted(ours.keys() | theirs.keys()):
                if ours.get(name) != theirs.get(name):
                    return f"another {what} ({name})"
        return None


def versions(extra: Sequence[str] = ()) -> dict[str, str]:
    """Of what computes, by package."""
    found = {name: importlib.metadata.version(name) for name in (*_LIBRARIES, *extra)}
    return {"mergequant-vllm": mergequant_vllm.__version__, **found}


class Shelf:
    """The records in a folder, held by one process at a time; use `shelf`."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def read(self, key: str, options: Mapping[str, JsonValue] | None) -> Record | None:
        """The record of a finished row; None if there is none of these options."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            record = Record.model_validate_json(path.read_bytes())
        except ValidationError:
            logger.warning("%s is damaged: its row is run again", path)
            return None
        if record.options != (None if options is None else dict(options)):
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
        """Where the row's checkpoint is made."""
        return self.output / "checkpoints" / key

    def _path(self, key: str) -> Path:
        return self.output / _ROWS / f"{key}.json"

    def _error(self, key: str) -> Path:
        return self.output / _ROWS / f"{key}.error.txt"


@contextmanager
def shelf(output: Path, study: Study) -> Iterator[Shelf]:
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
    if output.is_dir() and any(output.iterdir()) and not (output / _LOCK).exists():
        raise InputError(f"Output folder {output} holds other files: choose another or a new one.")
    held = None
    while held is None:
        try:
            (output / _ROWS).mkdir(parents=True, exist_ok=True)
            held = lock(output / _LOCK)
        except HeldError as error:
            raise InputError(
                f"Another run (process {error}) is writing {output}: wait for it, or choose "
                "another output."
            ) from error
        except OSError as error:
            raise InputError(f"{output} cannot be written ({error}): choose another.") from error
    return held


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

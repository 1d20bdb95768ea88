"""The folder of an unfinished run: files that are whole or absent, a lock, finished blocks.

| file in OUTPUT/.partial            | meaning                                                     |
|------------------------------------|-------------------------------------------------------------|
| `lock`                             | locked (flock) by the run that writes; holds its process id |
| `fingerprint.json`                 | what the run was begun with; written before the first block |
| `pilot.safetensors`                | what pilots measured of channels                            |
| `decision.json`                    | what they decided; written after it, before the first block |
| `model-0000N-of-0000M.safetensors` | block N, counted from 1; the last: what is around them      |
| `model-0000N-of-0000M.json`        | its record, written after it: the block is finished         |
| `publishing.json`                  | all is there; these names are on their way to OUTPUT        |

Hidden states are not among them: 256 windows of 2048 tokens at 4096 channels are 8.6 GB, more than
a model of 7B quantized. A continued run computes them again from the finished blocks.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergequant.errors import InputError
from mergequant.output.durable_files import hold, sync, write_durably, write_json
from mergequant.output.fingerprint import Fingerprint, file_sha256

FOLDER = ".partial"
_LOCK, _FINGERPRINT, _PUBLISHING = "lock", "fingerprint.json", "publishing.json"
_DECISION, _PILOT = "decision.json", "pilot.safetensors"
_SHA256 = "pilot_sha256"  # a field of the decision

logger = logging.getLogger("mergequant")


class BlockRecord(BaseModel):
    """Record of a finished block: the sha256 of its shard, and its lines of the report."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    report: list[dict[str, JsonValue]]


class UnfinishedRun:
    """`OUTPUT/.partial`, held by one process at a time.

    Attributes:
        folder: its path.
        shards: of the whole checkpoint, one a block and the last.
    """

    def __init__(self, output: Path, shards: int) -> None:
        self.folder = output / FOLDER
        self.shards = shards
        self._lock: int | None = None

    def shard(self, number: int) -> Path:
        """Path of shard `number`, counted from 0."""
        return self.folder / f"model-{number + 1:05d}-of-{self.shards:05d}.safetensors"

    def acquire(self) -> None:
        """Make the folder and lock it; raises InputError if another run holds it."""
        if self._lock is None:
            self._lock = hold(self.folder / _LOCK, self.folder.parent)

    def release(self) -> None:
        """Let other runs have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def discard(self) -> None:
        """Unfinish all blocks."""
        for record in self.folder.glob("model-*-of-*.json"):
            record.unlink()

    def finished(self) -> int:
        """How many blocks have a record."""
        return len(list(self.folder.glob("model-*-of-*.json")))

    def refuse_another(self, given: Fingerprint) -> None:
        """Raise InputError if the folder holds blocks of a run that was begun otherwise."""
        if not self.finished():
            return
        try:
            begun = Fingerprint.model_validate_json((self.folder / _FINGERPRINT).read_bytes())
        except (OSError, ValidationError) as error:
            raise InputError(
                f"{self.folder} holds an unfinished run of another release of mergequant-vllm, or "
                f"its {_FINGERPRINT} is damaged: finish it there, or remove {self.folder}."
            ) from error
        difference = begun.difference(given)
        if difference:
            raise InputError(
                f"{self.folder.parent} holds an unfinished run with {difference}: "
                f"give the same again, or remove {self.folder}."
            )

    def resume(self, given: Fingerprint) -> int:
        """Keep the finished blocks, drop the rest; returns how many, from the first, are kept.

        A block after a damaged one is dropped too: it was calibrated on what that one emitted.
        """
        finished = 0
        while finished < self.shards - 1 and self._is_whole(finished):
            finished += 1
        kept = {_LOCK, _FINGERPRINT, *((_DECISION, _PILOT) if finished else ())}
        for number in range(finished):
            kept |= {self.shard(number).name, _record(self.shard(number)).name}
        dropped = [path for path in self.folder.iterdir() if path.name not in kept]
        for path in sorted(dropped, key=lambda path: path.suffix != ".json"):  # records first
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(self.folder / _FINGERPRINT, given.model_dump(mode="json"))
        if finished:
            logger.info("Continuing: %d of %d blocks are finished", finished, self.shards - 1)
        elif dropped:
            logger.warning("Nothing in %s can be continued: it is begun anew", self.folder)
        return finished

    def decision(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `remember` kept for the finished blocks; empty if there are none.

        Raises:
            InputError: the tensors are not those that were kept.
        """
        try:
            decision: dict[str, Any] = json.loads((self.folder / _DECISION).read_text())
        except FileNotFoundError:
            return {}, {}
        file, known = self.folder / _PILOT, decision.pop(_SHA256, None)
        if not file.exists() or file_sha256(file) != known:
            raise InputError(
                f"The unfinished run's {_PILOT} is missing or damaged: remove the output folder's "
                f"{FOLDER} and begin again."
            )
        return decision, load_file(file)

    def remember(self, decision: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep a decision, and what it was made of, for a run that continues this one."""
        write_durably(self.folder / _PILOT, lambda path: save_file(dict(tensors), path))
        known = {_SHA256: file_sha256(self.folder / _PILOT)}
        write_json(self.folder / _DECISION, {**decision, **known})

    def _is_whole(self, number: int) -> bool:
        path = _record(self.shard(number))
        if not path.exists():
            return False
        try:
            record = self.record(number)
            whole = file_sha256(self.shard(number)) == record.sha256
        except (OSError, ValueError):  # a ValidationError is a ValueError
            whole = False
        if not whole:
            logger.warning("%s is damaged: its block is quantized again", self.shard(number))
        return whole

    def record(self, number: int) -> BlockRecord:
        """The record of finished block `number`."""
        return BlockRecord.model_validate(json.loads(_record(self.shard(number)).read_text()))

    def write_record(self, number: int, report: Sequence[dict[str, Any]]) -> None:
        """Declare block `number` finished."""
        shard = self.shard(number)
        record = BlockRecord(sha256=file_sha256(shard), report=list(report))
        write_json(_record(shard), record.model_dump())

    def published(self) -> list[str]:
        """Names that were on their way to OUTPUT when a run ended; else none."""
        with contextlib.suppress(FileNotFoundError):
            names: list[str] = json.loads((self.folder / _PUBLISHING).read_text())
            return names
        return []

    def publish(self, names: Sequence[str]) -> None:
        """Move files to OUTPUT, the last one when all others are safely there."""
        for name in names:
            sync(self.folder / name)
        write_json(self.folder / _PUBLISHING, list(names))
        for name in names:
            if name == names[-1]:
                sync(self.folder.parent)
            os.replace(self.folder / name, self.folder.parent / name)
        sync(self.folder.parent)
        (self.folder / _PUBLISHING).unlink()

    def take_back(self) -> None:
        """Undo a `publish` that was cut short, its last file first."""
        names = self.published()
        for name in reversed(names):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.folder.parent / name, self.folder / name)
        (self.folder / _PUBLISHING).unlink(missing_ok=True)


def _record(shard: Path) -> Path:
    return shard.with_suffix(".json")

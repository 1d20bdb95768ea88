"""Finished figures on disk, one cell at a time, so that a stopped run goes on where it was.

A cell is one of

    {"stamp", "date", ...figures}                  measured
    {"stamp", "date", "refused": sentence}         a kernel says why it does not run this
    {"stamp", "date", "failed": sentence}          something raised, or the process died

A cell is done when its stamp (device, driver, versions, kernel sources) is the present one; a
failed one is tried again by the next run. A subject of a cell that killed the GPU's context is left
out (`dead`) when the same run tries the cell again in a new process.
"""

import datetime
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Refused(Exception):  # noqa: N818 (a result, not an error)
    """Refusal of what is to be measured; the message is a clause that says why."""


class DeadDeviceError(RuntimeError):
    """The GPU's context is lost: nothing more can run in this process."""


class SubjectDiedError(RuntimeError):
    """One of the subjects that a cell compares took the GPU's context with it."""

    def __init__(self, subject: str, error: BaseException) -> None:
        super().__init__(f"{subject}: {sentence(error)}")
        self.subject, self.sentence = subject, sentence(error)


class OutOfTime(Exception):  # noqa: N818
    """The time limit of the command has passed; what is left is done by the next run."""


class Cells:
    """The cells of one part.

    Args:
        path: `PART.json`.
        head: date, device, versions, command: written at the head of the file.
        stamp: of the present run.
        end: `time.time()` after which no new cell is begun.
        again: measure cells anew although they are done.
        run: name of this command's run, the same after a restart.
        foreign: whether the cell of a key is of others' kernels alone, so that its stamp is
            `foreign_stamp`, without our sources.
    """

    def __init__(
        self,
        path: Path,
        head: Record,
        stamp: str,
        end: float,
        *,
        again: bool,
        run: str,
        foreign: Callable[[str], bool] = lambda key: False,
        foreign_stamp: str = "",
    ) -> None:
        self.path, self.head, self.stamp, self.end = path, head, stamp, end
        self.again, self.run = again, run
        self.foreign, self.foreign_stamp = foreign, foreign_stamp
        self.computed = 0
        self.marker = path.with_suffix(".running")
        self.done: dict[str, Record] = {}
        if path.exists():
            self.done = json.loads(path.read_text())["cells"]

    def is_current(self, key: str) -> bool:
        """Whether there is a cell for `key` with the present stamp."""
        present = self.foreign_stamp if self.foreign(key) else self.stamp
        return key in self.done and self.done[key]["stamp"] == present

    def wants(self, key: str) -> bool:
        """Whether `key` is still to be measured in this run."""
        if not self.is_current(key):
            return True
        cell = self.done[key]
        if cell.get("run") == self.run:
            return "dead" in cell and "failed" in cell
        return self.again or "failed" in cell

    def dead(self, key: str) -> dict[str, str]:
        """Subjects of `key` that this run must not touch again, each with what it did."""
        cell = self.done.get(key, {})
        return dict(cell.get("dead", {})) if cell.get("run") == self.run else {}

    def pending(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are still to be measured, the ones that failed before last."""
        wanted = [key for key in keys if self.wants(key)]
        return sorted(wanted, key=lambda key: "failed" in self.done.get(key, {}))

    def put(self, key: str, record: Record) -> None:
        """Write one finished cell to disk."""
        present = self.foreign_stamp if self.foreign(key) else self.stamp
        today = datetime.date.today().isoformat()
        self.done[key] = {"stamp": present, "date": today, "run": self.run, **record}
        self.computed += 1
        write_atomically(self.path, json.dumps({**self.head, "cells": self.done}, indent=1) + "\n")

    def measure(
        self, key: str, compute: Callable[[], Record], *, alive: Callable[[], None] | None = None
    ) -> None:
        """Run `compute` for `key` unless it is done, and record what comes of it.

        Args:
            alive: raises if the device has died; called after a failure.

        Raises:
            OutOfTime: the limit has passed, before anything was begun.
            DeadDeviceError: `alive` raised; the failure is recorded first.
        """
        if not self.wants(key):
            return
        self.check_time()
        self.marker.write_text(json.dumps([key, self.run]))
        try:
            self.put(key, compute())
        except OutOfTime:
            raise
        except Refused as reason:
            self.put(key, {"refused": str(reason)})
        except SubjectDiedError as death:
            dead = {**self.dead(key), death.subject: death.sentence}
            self.put(key, {"failed": str(death), "dead": dead})
            raise DeadDeviceError(str(death)) from death
        except Exception as error:  # recorded: one failure never stops a part
            self.put(key, {"failed": sentence(error)})
            print(f"  {key}: {sentence(error)}", flush=True)
            self._check_alive(alive)
        finally:
            self.marker.unlink(missing_ok=True)

    def check_time(self) -> None:
        """Raise OutOfTime after the end."""
        if time.time() >= self.end:
            raise OutOfTime

    def records(self) -> dict[str, Record]:
        """Cells with figures, by key."""
        return {
            key: cell
            for key, cell in self.done.items()
            if "refused" not in cell and "failed" not in cell
        }

    def troubles(self) -> list[str]:
        """A line of Markdown for each cell that was refused or failed."""
        return [
            f"- {word.upper()} {key}: {cell[word]}"
            for key, cell in self.done.items()
            for word in ("refused", "failed")
            if word in cell
        ]

    def _check_alive(self, alive: Callable[[], None] | None) -> None:
        if alive is None:
            return
        try:
            alive()
        except Exception as error:
            raise DeadDeviceError(sentence(error)) from error

    def record_interrupted(self) -> None:
        """Record the cell in which an earlier process of this part died."""
        if self.marker.exists():
            key, run = json.loads(self.marker.read_text())
            self.marker.unlink()
            self.put(key, {"failed": "the process died or was stopped while it ran", "run": run})
            self.computed = 0


def sentence(error: BaseException) -> str:
    """An exception in one line of at most 300 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300].rstrip(": ")


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, never finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)

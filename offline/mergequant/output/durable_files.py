"""Files that are whole or absent whenever the machine stops, and a lock between processes."""

import fcntl
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from mergequant.errors import InputError

logger = logging.getLogger("mergequant")


class HeldError(Exception):
    """A lock that another process holds; the message is its id."""


def lock(path: Path) -> int | None:
    """Lock a file, made if need be, until the descriptor that is returned is closed.

    None: the file was removed meanwhile by who held it; try again. A process that is killed lets
    its locks go.

    Raises:
        HeldError: another process holds it.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(file, 20, 0).decode() or "unknown"
        os.close(file)
        raise HeldError(holder) from error
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked (%s): start no second run there", path, error)
    if not _is_file(file, path):
        os.close(file)
        return None
    os.ftruncate(file, 0)
    os.pwrite(file, str(os.getpid()).encode(), 0)
    return file


def hold(path: Path, output: Path) -> int:
    """Lock `path`, whose folder is made if need be, on behalf of `output`: the open descriptor.

    Raises:
        InputError: another run holds it.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = lock(path)
        except HeldError as error:
            raise InputError(
                f"Another run (process {error}) is writing {output}: wait for it, or choose "
                "another output."
            ) from error
        except FileNotFoundError:  # its folder was removed by a run that has just ended
            continue
        if held is not None:
            return held


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def write_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file that is whole or not there, whenever the machine stops."""
    partial = path.with_name(f"{path.name}.tmp")
    write(partial)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def write_json(path: Path, value: object) -> None:
    """A JSON file, by `write_durably`."""
    text = json.dumps(value, indent=2) + "\n"
    write_durably(path, lambda partial: partial.write_text(text))


def sync(path: Path) -> None:
    """Have the system bring a file, or a folder's names, to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:
        if not path.is_dir():  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(opened)

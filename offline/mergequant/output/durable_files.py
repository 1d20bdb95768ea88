"""Files that are whole or absent whenever the machine stops, and a lock between processes."""

import fcntl
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mergequant.errors import DiskError, InputError

_OF_THE_DISK = re.compile("I/O error|IoError")

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


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise DiskError if what is done in this context fails for the disk of `folder`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors wraps the system's errors, and has others of its own.
        if isinstance(error, SafetensorError) and not _OF_THE_DISK.search(str(error)):
            raise
        raise DiskError(
            f"{folder} cannot be written ({error}): free space there, or mend what is named, and "
            "run the same command again; what is finished is kept."
        ) from error


def write_durably(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file that is whole or not there, whenever the machine stops.

    Raises:
        DiskError: the disk is full or broken; nothing is left of the file.
    """
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with writing(path.parent):
            write(partial)
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
    except DiskError:
        partial.unlink(missing_ok=True)
        raise


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

"""A folder that is complete or absent, however its making ends."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Yield a folder beside `output` to write into; it is renamed to `output` at the end.

    If the block raises, the folder is removed and `output` is not made.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{output.name}.", dir=output.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

"""Whether a checkpoint will fit on the disk, known before the first block."""

import math
import shutil
from pathlib import Path

from mergequant.errors import InputError
from mergequant.model.weight_files import DTYPE_BYTES
from mergequant_vllm.format import CheckpointFormat, expected_tensors

_BESIDE = 64 * 2**20  # bytes of tokenizer, report, index and file system


def checkpoint_bytes(checkpoint: CheckpointFormat, plain: int) -> int:
    """Bytes of a checkpoint's files.

    Args:
        plain: bytes of a number in tensors that keep the source model's dtype.
    """
    tensors = expected_tensors(checkpoint).values()
    sizes = (math.prod(x.shape) * (DTYPE_BYTES[x.dtype] if x.dtype else plain) for x in tensors)
    return sum(sizes) + _BESIDE


def refuse_if_full(output: Path, needed: int) -> None:
    """Raise InputError unless so many bytes, less what `output` holds, are free on its disk."""
    there = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    folder = next(x for x in (output, *output.absolute().parents) if x.exists())
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise InputError(
            f"The checkpoint takes {needed / 1e9:.1f} GB and the disk of {folder} has "
            f"{free / 1e9:.1f} GB free: free some there, or choose another output."
        )

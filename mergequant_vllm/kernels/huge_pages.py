"""Memory for packed weights in huge pages, which products read faster: fewer addresses to look up.

Decoding reads all weights for each token. Linux gives huge pages to those who ask
(`transparent_hugepage` at its usual `madvise`, or `always`); elsewhere this is ordinary memory.
"""

import contextlib
import mmap

import torch
from torch import Tensor

_HUGE = 2 * 2**20  # bytes of a page
_CHUNK = 16 * _HUGE  # small models' weights share pages
_LINE = 64


class _Arena:
    """Hands out one mapping after another; a mapping lives as long as a tensor in it."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        if size > len(self._chunk):
            mapped = _map(max(size, _CHUNK))
            if size > _CHUNK // 2:  # by itself: what is left of the chunk is used further
                return mapped[:size]
            self._chunk = mapped
        taken = self._chunk[:size]
        self._chunk = self._chunk[-(-size // _LINE) * _LINE :]
        return taken


def _map(size: int) -> Tensor:
    """Untouched memory, uint8 [`size` or more], that begins at a huge page."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    mapped = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them: pages are of the usual size
        mapped.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    return whole[-whole.data_ptr() % _HUGE :]


_arena = _Arena()


def empty(size: int) -> Tensor:
    """Uninitialized uint8 [size] on the CPU, at a cache line.

    A tensor in it keeps its neighbours' memory, up to 32 MiB: for what lives as long as the model.
    """
    return _arena.take(size)

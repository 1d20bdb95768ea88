"""What a machine can do at most, measured: reading memory, and float32 products for its clock.

Bounds of a linear whose weights have 4 bits, in products (MAC) a second:

- reading: memory bandwidth / bytes of the packed weights * products of the call. Decoding.
- arithmetic: clock * products that the instruction set's shortest loop adds up in a cycle
  (`instruction_sets`). Prefill. The clock is not read off: MKL's float32 product of matrices that
  fit the cache is taken to reach 95% of clock * float32 products in a cycle.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.cpu.instruction_sets import find_instruction_set

FLOAT32_SHARE = 0.95  # of its peak that MKL is taken to reach on matrices in the cache
PRODUCT_SIZES = (512, 768, 1024)
TRIES = 7
CACHES = 4  # what is read has so many times the size of the cache


@dataclass(frozen=True)
class Limits:
    """All with the threads that PyTorch has.

    Attributes:
        bandwidth: bytes/s read from memory.
        float32: float32 products/s.
        codes: 4-bit products/s of the instruction set, None if nothing is known about it.
        clock: Hz that `float32` stands for, None likewise.
    """

    bandwidth: float
    float32: float
    codes: float | None
    clock: float | None

    def bound(self, products: int, packed_bytes: int) -> float:
        """The smaller of both bounds of a call, in products/s."""
        read_bound = self.bandwidth / packed_bytes * products
        return read_bound if self.codes is None else min(read_bound, self.codes)


def measure_limits(isa: str, cache: int, *, tries: int = TRIES) -> Limits:
    """Measure them; `cache`: bytes of the last level."""
    return derive(isa, bandwidth(CACHES * cache, tries), float32_products(tries), threads())


def derive(isa: str, read: float, float32: float, cores: int) -> Limits:
    """From bytes/s and float32 products/s of all cores to the limits."""
    instruction_set = find_instruction_set(isa)
    if instruction_set.codes is None or instruction_set.floats is None:
        return Limits(read, float32, None, None)
    cycles = float32 / FLOAT32_SHARE / instruction_set.floats
    return Limits(read, float32, cycles * instruction_set.codes, cycles / cores)


def threads() -> int:
    """Number of threads that PyTorch uses."""
    return torch.get_num_threads()


def bandwidth(size: int, tries: int) -> float:
    """Bytes/s read, the best of sums over integers and over floats of `size` bytes."""
    data = torch.ones(size // 8, dtype=torch.int64)
    reads: tuple[Callable[[], object], ...] = (
        data.sum,
        data.view(torch.float32).sum,
        data.view(torch.float32).max,
    )
    return data.numel() * 8 / min(_best(read, tries) for read in reads)


def float32_products(tries: int) -> float:
    """Products/s of the best square float32 product in the cache."""
    rates = []
    for size in PRODUCT_SIZES:
        a, b, out = (torch.ones(size, size) for _ in range(3))
        seconds = _best(partial(torch.mm, a, b, out=out), 3 * tries)
        rates.append(size**3 / seconds)
    return max(rates)


def _best(call: Callable[[], object], tries: int) -> float:
    call()
    taken = []
    for _ in range(tries):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return min(taken)

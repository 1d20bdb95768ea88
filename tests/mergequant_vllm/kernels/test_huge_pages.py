"""Huge pages: memory of each tensor its own, at a cache line, and ordinary where there are none."""

import gc
import mmap
import re
from pathlib import Path

import pytest
import torch

from mergequant_vllm.kernels import huge_pages
from mergequant_vllm.kernels.linear.cpu.int4 import pack_weight

MIB = 2**20


@pytest.fixture(autouse=True)
def arena(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_arena", huge_pages._Arena())


def test_no_two_tensors_share_a_byte() -> None:
    sizes = [1, 64, 100, 5 * MIB, 3, 20 * MIB, 40 * MIB, 7 * MIB, 31 * MIB]
    tensors = [huge_pages.empty(size) for size in sizes]
    for number, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        assert tensor.shape == (size,) and tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


def test_a_large_one_does_not_throw_away_what_is_left() -> None:
    first = huge_pages.empty(MIB)
    huge_pages.empty(100 * MIB)
    assert huge_pages.empty(MIB).data_ptr() == first.data_ptr() + MIB


def test_memory_is_given_back_with_its_last_tensor() -> None:
    def mapped() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmSize:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]

    before = mapped()
    tensor = huge_pages.empty(512 * MIB)
    assert mapped() >= before + 512 * MIB
    del tensor
    gc.collect()
    assert mapped() < before + 256 * MIB


@pytest.mark.parametrize("case", ["no such advice", "refused"])
def test_where_there_are_none_it_is_ordinary_memory(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "refused":
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)  # EINVAL
    else:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert bool((huge_pages.empty(3 * MIB).fill_(7) == 7).all())


def test_packed_weights_are_in_them() -> None:
    before = huge_pages.empty(64).data_ptr()
    packed = pack_weight(torch.zeros(64, 64, dtype=torch.int8), 4)
    assert 0 < packed.data_ptr() - before < 32 * MIB

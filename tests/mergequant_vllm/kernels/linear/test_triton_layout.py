"""The Triton kernel's weight layout, there and back, and the assembly that unpacks it."""

import re

import pytest
import torch
from torch import Tensor

from mergequant_vllm.kernels.linear.triton.layout import (
    SHORTEST_RUN,
    TritonLayout,
    choose_layout,
    from_kernel_layout,
    to_kernel_layout,
)
from mergequant_vllm.kernels.linear.triton.unpacking import unpacking
from tests.mergequant_vllm.kernels.made import random_codes

GROUPS = [None, 32, 64, 96, 128, 160, 192, 256, 384, 512, 1024]
COLUMNS = [1, 31, 127, 128, 129, 352, 700, 896, 4096, 4099]


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_there_and_back(bits: int, group_size: int | None) -> None:
    for columns in COLUMNS:
        layout = choose_layout(columns, bits, group_size)
        codes = random_codes(bits, 5, columns, seed=columns)
        weight = to_kernel_layout(codes, layout)
        assert weight.dtype == torch.int8 and weight.shape == (5, layout.row_bytes)
        back = from_kernel_layout(weight, layout)
        assert torch.equal(back[:, :columns], codes)
        assert not back[:, columns:].any()


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_what_the_kernel_relies_on(bits: int, group_size: int | None) -> None:
    for columns in COLUMNS:
        layout = choose_layout(columns, bits, group_size)
        assert layout.bits >= bits and layout.run >= SHORTEST_RUN
        assert layout.columns >= columns and layout.columns % layout.largest_step == 0
        assert layout.largest_step % layout.tile == 0
        assert layout.row_bytes % 16 == 0 and layout.columns % 16 == 0  # vector loads
        if group_size is not None and group_size >= layout.tile:
            assert group_size % layout.largest_step == 0
        elif group_size is not None:
            assert layout.tile % group_size == 0 and group_size % layout.run == 0


def test_codes_keep_their_width_where_the_group_allows_it() -> None:
    def widths(bits: int) -> dict[int | None, int]:
        return {group: choose_layout(4096, bits, group).bits for group in GROUPS}

    assert {group for group, bits in widths(4).items() if bits > 4} == {96, 160}
    wider = {group: bits for group, bits in widths(3).items() if bits > 3}
    assert wider == {96: 8, 160: 8, 192: 4, 384: 4}


@pytest.mark.parametrize(
    ("columns", "padded"), [(4096, 4096), (11008, 11008), (896, 896), (1, 128)]
)
def test_usual_widths_are_not_padded(columns: int, padded: int) -> None:
    assert choose_layout(columns, 4, None).columns == padded


def test_many_rows_are_converted_piece_by_piece() -> None:
    layout = choose_layout(64, 4, None)
    codes = random_codes(4, 4097, 64)
    assert torch.equal(from_kernel_layout(to_kernel_layout(codes, layout), layout)[:, :64], codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_assembly_unpacks_every_byte(bits: int) -> None:
    """Interpreted here instruction by instruction; Triton's interpreter runs plain formulas."""
    layout = TritonLayout(bits, 1, {3: 8, 4: 2}[bits], 1)
    if bits == 3:
        planes = torch.randint(-128, 128, (4096, 3), dtype=torch.int8)
    else:
        planes = torch.arange(-128, 128, dtype=torch.int8).reshape(-1, 1)
    codes = from_kernel_layout(planes, layout)
    for part, assembly in enumerate(unpacking(bits)):
        registers = {"$1": as_words(planes[:, part % 2 if bits == 3 else 0])}
        if bits == 3:
            registers["$2"] = as_words(planes[:, 2])
        run_assembly(assembly, registers)
        expected = codes[:, part] << (8 - bits)
        assert torch.equal(registers["$0"], as_words(expected))


def as_words(four_bytes_each: Tensor) -> Tensor:
    """int8 [4 n] to unsigned words, int64 [n]."""
    return four_bytes_each.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def run_assembly(text: str, registers: dict[str, Tensor]) -> None:
    """Execute the few PTX instructions that `unpacking` uses on unsigned words."""
    for instruction in re.sub(r"[{}]|\.reg [^;]*;", "", text).split(";"):
        if not instruction.strip():
            continue
        name, target, *operands = instruction.replace(",", " ").split()
        a, b = (registers[o] if o in registers else torch.tensor(int(o, 0)) for o in operands)
        result = {
            "shl.b32": lambda a, b: a << b,
            "shr.b32": lambda a, b: a >> b,
            "and.b32": lambda a, b: a & b,
            "or.b32": lambda a, b: a | b,
        }[name](a, b)
        registers[target] = result & 0xFFFFFFFF

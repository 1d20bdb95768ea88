"""Packed words against the layout spelled out, and there and back again."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32

from mergequant_vllm.packing import codes_per_border, pack, unpack, words_per_row


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 10, 11, 22, 31, 32, 33, 43, 127, 128, 129, 172])
def test_words_are_one_stream_of_codes_from_the_lowest_bits_up(bits: int, columns: int) -> None:
    half = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(-half, half, (5, columns), generator=generator, dtype=torch.int8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (5, words_per_row(columns, bits))
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum((code + half) << (bits * k) for k, code in enumerate(row))
        assert stream == sum((word & 0xFFFFFFFF) << (32 * j) for j, word in enumerate(words))
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 9, 128, 1001])
def test_bytes_are_read_as_compressed_tensors_reads_words(bits: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    shape = (6, words_per_row(columns, bits))
    words = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32)
    theirs = unpack_from_int32(words, bits, torch.Size((6, columns)), packed_dim=1)
    assert torch.equal(unpack(words, bits, columns), theirs)
    assert torch.equal(unpack(words[::2], bits, columns), theirs[::2])


def test_words_hold_code_plus_8_lowest_column_in_the_lowest_nibble() -> None:
    codes = torch.tensor([[-8, -7, 0, 1, 7, 2, 3, -1, 5]], dtype=torch.int8)
    words = pack(codes, 4)[0].tolist()
    nibbles = [(word >> (4 * i)) & 15 for word in words for i in range(8)]
    assert nibbles == [0, 1, 8, 9, 15, 10, 11, 7, 13, 0, 0, 0, 0, 0, 0, 0]


def test_6_bits_are_stored_as_8() -> None:
    codes = torch.arange(-32, 32, dtype=torch.int8).reshape(2, 32)
    assert torch.equal(pack(codes, 6), pack(codes, 8))
    assert torch.equal(unpack(pack(codes, 6), 6, 32), codes)


@pytest.mark.parametrize(("bits", "border"), [(3, 32), (4, 8), (6, 4), (8, 4)])
def test_a_row_can_be_cut_where_words_end(bits: int, border: int) -> None:
    assert codes_per_border(bits) == border
    generator = torch.Generator().manual_seed(0)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (2, 3 * border), generator=generator, dtype=torch.int8)
    cut = words_per_row(border, bits)
    assert torch.equal(unpack(pack(codes, bits)[:, cut:], bits, 2 * border), codes[:, border:])

"""Packed words against the layout spelled out, and there and back again."""

import pytest
import torch

from mergequant_vllm.packing import pack, unpack, words_per_row


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 43, 86, 127, 128, 129, 172])
def test_unpack_is_the_inverse_of_pack(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(-8, 8, (5, columns), generator=generator, dtype=torch.int8)
    packed = pack(codes, 4)
    assert packed.dtype == torch.int32
    assert packed.shape == (5, words_per_row(columns, 4))
    assert torch.equal(unpack(packed, 4, columns), codes)


def test_words_hold_code_plus_8_lowest_column_in_the_lowest_nibble() -> None:
    codes = torch.tensor([[-8, -7, 0, 1, 7, 2, 3, -1, 5]], dtype=torch.int8)
    words = pack(codes, 4)[0].tolist()
    nibbles = [(word >> (4 * i)) & 15 for word in words for i in range(8)]
    assert nibbles == [0, 1, 8, 9, 15, 10, 11, 7, 13, 0, 0, 0, 0, 0, 0, 0]

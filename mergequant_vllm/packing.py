"""Codes to int32 words and back, in compressed-tensors' pack-quantized layout.

Stored layout, 4 bits: word j of a row holds columns 8j..8j+7, column 8j in the lowest nibble, each
as code + 8. A row whose length is not a multiple of 8 ends with zero nibbles.
"""

import torch
from compressed_tensors.compressors.pack_quantized import (
    pack_to_int32,
    unpack_from_int32,
)
from torch import Tensor

WORD_BITS = 32


def codes_per_word(bits: int) -> int:
    """How many codes of `bits` one int32 word holds."""
    return WORD_BITS // bits


def words_per_row(columns: int, bits: int) -> int:
    """Length in words of a packed row of `columns` codes."""
    return -(-columns // codes_per_word(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes` int8 [rows, columns] into int32 [rows, words_per_row(columns)]."""
    packed: Tensor = pack_to_int32(codes, bits, packed_dim=1)
    return packed


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: int32 [rows, words] to int8 codes [rows, columns]."""
    shape = torch.Size((packed.shape[0], columns))
    codes: Tensor = unpack_from_int32(packed, bits, shape, packed_dim=1)
    return codes

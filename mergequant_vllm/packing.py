"""Codes to int32 words and back: the stored layout of weights.

Every width is stored offset-binary (code + 2^(b-1)), the first column in the lowest bits, and the
bits of a row beyond its last code are zero.

* 4 and 8 bits: compressed-tensors' pack-quantized layout, written by its own function. It is read
  byte by byte here: its own reader widens each code to 64 bits, which took most of the time that
  a server needs to load a checkpoint.
* 3 bits: a tight stream, 32 codes in 3 words, so that some codes straddle two words.
  compressed-tensors would put ten codes in a word, which no kernel of vLLM takes.
* 6 bits: as 8 bits, whose kernels multiply them; they are meant for accuracy between 4 and 8, not
  for size.
"""

import sys
from fractions import Fraction

import torch
from compressed_tensors.compressors.pack_quantized import (
    pack_to_int32,
    unpack_from_int32,
)
from torch import Tensor

WORD_BITS = 32
# Unpacking makes wide intermediates; on a GPU that its weights fill they must stay small.
_CODES_AT_ONCE = 2**22
STREAM_CODES = 32  # codes after which a stream of any width is back at a word's border


def stored_bits(bits: int) -> int:
    """Bits that a code of `bits` takes in memory, where kernels see it as one of so many."""
    return 8 if bits == 6 else bits


def codes_per_word(bits: int) -> Fraction:
    """How many codes of `bits` one int32 word holds: 8, 4 or, at 3 bits, 32/3."""
    return Fraction(WORD_BITS, stored_bits(bits))


def codes_per_border(bits: int) -> int:
    """Smallest number of codes that fills whole words: where a shard of a row may begin."""
    return codes_per_word(bits).numerator


def words_per_row(columns: int, bits: int) -> int:
    """Length in words of a packed row of `columns` codes."""
    return -(-columns * stored_bits(bits) // WORD_BITS)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes` int8 [rows, columns] into int32 [rows, words_per_row(columns)]."""
    if bits == 3:
        return _pack_stream(codes, bits)
    packed: Tensor = pack_to_int32(codes, stored_bits(bits), packed_dim=1)
    return packed


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: int32 [rows, words] to int8 codes [rows, columns]."""
    bits = stored_bits(bits)
    codes = torch.empty(packed.shape[0], columns, dtype=torch.int8, device=packed.device)
    rows = max(1, _CODES_AT_ONCE // max(1, columns))
    for start in range(0, packed.shape[0], rows):
        codes[start : start + rows] = _unpack_rows(packed[start : start + rows], bits, columns)
    return codes


def _unpack_rows(words: Tensor, bits: int, columns: int) -> Tensor:
    if bits == 3:
        return _unpack_stream(words, bits, columns)
    if sys.byteorder == "big":
        shape = torch.Size((words.shape[0], columns))
        whole: Tensor = unpack_from_int32(words, bits, shape, packed_dim=1)
        return whole
    stored = words.contiguous().view(torch.uint8)  # the first column in the lowest byte
    if bits == 4:
        stored = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1)
    offset = 2 ** (bits - 1)
    # Both subtract the offset; of 8 bits it is the sign's bit.
    codes = (stored ^ offset).view(torch.int8) if bits == 8 else stored.view(torch.int8) - offset
    inside: Tensor = codes[:, :columns]
    return inside


def _places(bits: int) -> list[tuple[int, int]]:
    """Word and shift at which each of `STREAM_CODES` codes begins."""
    return [divmod(bits * number, WORD_BITS) for number in range(STREAM_CODES)]


def _pack_stream(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    runs = -(-columns // STREAM_CODES)
    values = torch.zeros(rows, runs * STREAM_CODES, dtype=torch.int64, device=codes.device)
    values[:, :columns] = codes.to(torch.int64) + 2 ** (bits - 1)
    values = values.reshape(rows, runs, STREAM_CODES)
    # One word more than a run has: no code straddles the last border.
    words = torch.zeros(rows, runs, bits + 1, dtype=torch.int64, device=codes.device)
    for number, (word, shift) in enumerate(_places(bits)):
        spread = values[:, :, number] << shift
        words[:, :, word] |= spread & (2**WORD_BITS - 1)
        words[:, :, word + 1] |= spread >> WORD_BITS
    stream = words[:, :, :bits].reshape(rows, runs * bits)[:, : words_per_row(columns, bits)]
    signed = torch.where(stream >= 2 ** (WORD_BITS - 1), stream - 2**WORD_BITS, stream)
    return signed.to(torch.int32).contiguous()


def _unpack_stream(packed: Tensor, bits: int, columns: int) -> Tensor:
    rows = packed.shape[0]
    runs = -(-columns // STREAM_CODES)
    words = torch.zeros(rows, runs * bits + 1, dtype=torch.int64, device=packed.device)
    words[:, : packed.shape[1]] = packed.to(torch.int64) & (2**WORD_BITS - 1)
    codes = torch.empty(rows, runs, STREAM_CODES, dtype=torch.int8, device=packed.device)
    for number, (word, shift) in enumerate(_places(bits)):
        pair = words[:, word:-1:bits] | (words[:, word + 1 :: bits][:, :runs] << WORD_BITS)
        values = (pair >> shift) & (2**bits - 1)
        codes[:, :, number] = (values - 2 ** (bits - 1)).to(torch.int8)
    return codes.reshape(rows, -1)[:, :columns].contiguous()

"""Weight codes as the Triton kernel reads them: planes of bits that unpack without moving columns.

A row of K columns is cut into tiles, a tile into `parts` runs of `run` columns. Byte j of a tile's
plane holds bits of column j of every part, so one part of a loaded plane is a shift and a mask away
from int8 codes, byte for byte, and meets a contiguous run of activation codes:

| bits | parts | planes of `run` bytes | byte j, lowest bits first                                |
|------|-------|-----------------------|----------------------------------------------------------|
| 8    | 1     | 1                     | the code of column j                                     |
| 4    | 2     | 1                     | column j of part 0, column j of part 1                   |
| 3    | 8     | 3                     | plane 0: low two bits of parts 0, 2, 4, 6; plane 1: of   |
|      |       |                       | parts 1, 3, 5, 7; plane 2: sign bits of parts 0 to 7     |

Codes are two's complement; columns beyond K hold code 0, so what they meet does not matter.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST_RUN = 32  # columns that one int8 tensor-core instruction takes
LONGEST_RUN = 64
LARGEST_STEP = 512

_PARTS = {3: 8, 4: 2, 8: 1}
_PLANES = {3: 3, 4: 1, 8: 1}
_ROWS_AT_ONCE = 4096  # bounds the memory of the conversion


@dataclass(frozen=True)
class TritonLayout:
    """How the rows of one linear are laid out.

    Attributes:
        bits: 3, 4 or 8: width of a code in the kernel's layout, at least the stored one.
        run: columns of a part of a tile.
        columns: K padded.
        largest_step: columns that the kernel may take at once, at most: a multiple of the tile
            that divides `columns` and, where a group has whole tiles, the group.
    """

    bits: int
    run: int
    columns: int
    largest_step: int

    @property
    def parts(self) -> int:
        """Parts of a tile."""
        return _PARTS[self.bits]

    @property
    def planes(self) -> int:
        """Planes of a tile, each of `run` bytes."""
        return _PLANES[self.bits]

    @property
    def tile(self) -> int:
        """Columns of a tile."""
        return self.parts * self.run

    @property
    def row_bytes(self) -> int:
        """Length of a row of weights."""
        return self.columns // self.tile * self.planes * self.run


@functools.cache
def choose_layout(in_features: int, weight_bits: int, group_size: int | None) -> TritonLayout:
    """The narrowest layout whose tile and the group fit whole into one another.

    Codes whose own tiles fit no group are held wider: groups of 96 take 8 bits, and at 3 bits
    groups of 384 take 4.
    """
    bits, run = next(
        (bits, run)
        for bits in (3, 4, 8)
        for run in (LONGEST_RUN, SHORTEST_RUN)
        if bits >= weight_bits and _fits(_PARTS[bits] * run, run, bits, group_size)
    )
    tile = _PARTS[bits] * run
    if group_size is None:
        step = _step_without_groups(in_features, tile)
        columns = _round_up(in_features, step)
        return TritonLayout(bits, run, columns, _largest_step(columns, step))
    step = tile if group_size <= tile else _largest_step(group_size, tile)
    return TritonLayout(bits, run, _round_up(in_features, step), step)


def _fits(tile: int, run: int, bits: int, group_size: int | None) -> bool:
    if bits == 3 and run > SHORTEST_RUN:
        return False  # tiles of 512 columns would pad most rows
    if group_size is None:
        return True
    return group_size % run == 0 and (group_size % tile == 0 or tile % group_size == 0)


def _step_without_groups(in_features: int, tile: int) -> int:
    """256 if that pads K by no more than a sixteenth, else the tile."""
    wide = max(tile, 256)
    return wide if _round_up(in_features, wide) - in_features <= in_features // 16 else tile


def _largest_step(columns: int, tile: int) -> int:
    """The largest power-of-two multiple of `tile` that divides `columns`."""
    return max(tile, min(LARGEST_STEP, math.gcd(columns, LARGEST_STEP)))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def to_kernel_layout(codes: Tensor, layout: TritonLayout) -> Tensor:
    """Codes int8 [N, K] to int8 [N, row_bytes]."""
    starts = range(0, codes.shape[0], _ROWS_AT_ONCE)
    return torch.cat([_pack_rows(codes[i : i + _ROWS_AT_ONCE], layout) for i in starts])


def _pack_rows(codes: Tensor, layout: TritonLayout) -> Tensor:
    padded = F.pad(codes, (0, layout.columns - codes.shape[1]))
    c = padded.reshape(padded.shape[0], -1, layout.parts, layout.run)
    if layout.bits == 8:
        planes = c
    elif layout.bits == 4:
        planes = _interleave(c & 15, 4).unsqueeze(2)
    else:
        low = c & 3
        sign = (c >> 2) & 1
        even, odd = _interleave(low[:, :, 0::2], 2), _interleave(low[:, :, 1::2], 2)
        planes = torch.stack((even, odd, _interleave(sign, 1)), dim=2)
    return planes.reshape(padded.shape[0], layout.row_bytes)


def _interleave(fields: Tensor, width: int) -> Tensor:
    """Fields of `width` bits, int8 [N, tiles, parts, run], to bytes int8 [N, tiles, run]."""
    packed = torch.zeros_like(fields[:, :, 0])
    for part in range(fields.shape[2]):
        packed |= fields[:, :, part] << (width * part)
    return packed


def from_kernel_layout(weight: Tensor, layout: TritonLayout) -> Tensor:
    """The inverse of `to_kernel_layout`, padding kept: int8 [N, columns]."""
    planes = weight.reshape(weight.shape[0], -1, layout.planes, layout.run)
    if layout.bits == 8:
        return weight.clone()
    if layout.bits == 4:
        plane = planes[:, :, 0]
        c = torch.stack(((plane << 4) >> 4, plane >> 4), dim=2)
    else:
        c = torch.stack([_code_of_part(planes, part) for part in range(8)], dim=2)
    return c.reshape(weight.shape[0], layout.columns)


def _code_of_part(planes: Tensor, part: int) -> Tensor:
    low = (planes[:, :, part % 2] >> (part // 2 * 2)) & 3
    sign = (planes[:, :, 2] >> part) & 1
    return low - 4 * sign

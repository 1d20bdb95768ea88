"""The Triton program of static rounding: gather, offset, round, clamp, pad, lay out.

A program takes a tile [ROWS, PARTS, WIDTH]: some tokens, and some places of a row. The parts are
the columns that share a place: 2 for nibbles, `columns / 2` apart, else 1. The last four steps are
a function of their own, `write_tile`, which the per-token quantizer calls too.

See `triton_mode` for who may import this module.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(z: tl.tensor, SMALLEST: tl.constexpr, LARGEST: tl.constexpr) -> tl.tensor:
    """Return z float32 rounded half to even to codes, of its own dtype; NaN stays.

    Clamping first gives the same codes; sums beyond 2^23 have no room for a fraction, so that the
    addition rounds to an integer.
    """
    bounded = tl.clamp(z, SMALLEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return (bounded + 12582912.0) - 12582912.0


@triton.jit
def write_tile(
    z: tl.tensor,
    codes: tl.tensor,
    rows: tl.tensor,
    start: tl.tensor,
    tokens: tl.tensor,
    K: tl.tensor,
    columns: tl.tensor,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """Round, clamp, pad, lay out and store one tile.

    Args:
        z: float32 [ROWS, PARTS, WIDTH], in steps; anything beyond K.
        codes: float32, int8 or, if PARTS is 2, uint8 [tokens, columns / PARTS].
        rows: int64 [ROWS], the tile's tokens.
        start: the tile's first place in a row of `codes`.
        tokens: rows from here on are not written.
        K: columns from here on are padding.
        columns: padding included.
        SMALLEST: code.
        LARGEST: code.
    """
    ROWS: tl.constexpr = z.shape[0]
    PARTS: tl.constexpr = z.shape[1]
    WIDTH: tl.constexpr = z.shape[2]
    width = columns // PARTS
    place = start + tl.arange(0, WIDTH)
    column = tl.arange(0, PARTS)[:, None] * width + place[None, :]
    laid_out = tl.where((column < K)[None, :, :], rounded(z, SMALLEST, LARGEST), 0.0)
    if codes.dtype.element_ty != tl.float32:
        laid_out = tl.where(laid_out == laid_out, laid_out, 0.0).to(tl.int8)
    if PARTS == 2:
        low, high = tl.split(tl.permute(laid_out, (0, 2, 1)))
        laid_out = ((low & 15) | (high << 4)).to(tl.uint8, bitcast=True)
    else:
        laid_out = tl.reshape(laid_out, (ROWS, WIDTH))
    inside = (rows < tokens)[:, None] & (place < width)[None, :]
    tl.store(codes + rows[:, None] * width + place[None, :], laid_out, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def static_codes_program(
    normed: tl.tensor,
    index: tl.tensor | None,
    offset: tl.tensor | None,
    codes: tl.tensor,
    tokens: tl.tensor,
    stride: tl.tensor,
    K: tl.tensor,
    columns: tl.tensor,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """Write the codes of one tile.

    Args:
        normed: [tokens, n] of any floating dtype, rows `stride` apart.
        index: int32 [K] or None.
        offset: float32 [K] or None.
        codes: see `write_tile`, as are the arguments not named here.
        ROWS: tokens of the tile, a power of two.
        PARTS: columns that share a place.
        WIDTH: places of the tile, a power of two.
    """
    # 64 bits: tokens * n passes 2^31 in long prefills.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * WIDTH
    place = start + tl.arange(0, WIDTH)
    column = tl.arange(0, PARTS)[:, None] * (columns // PARTS) + place[None, :]
    channel = column
    if index is not None:
        channel = tl.load(index + column, mask=column < K, other=0)
    inside = (rows < tokens)[:, None, None] & (column < K)[None, :, :]
    starts = normed + rows[:, None, None] * stride
    z = tl.load(starts + channel[None, :, :], mask=inside, other=0).to(tl.float32)
    if offset is not None:
        z = z + tl.load(offset + column, mask=column < K, other=0)[None, :, :]
    write_tile(z, codes, rows, start, tokens, K, columns, SMALLEST, LARGEST)

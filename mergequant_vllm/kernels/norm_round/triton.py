"""The static path's rounding as one Triton kernel: gather, offset, round, clamp, pad, lay out.

A program takes a tile [ROWS, PARTS, WIDTH]: some tokens, and some places of a row. The parts are
the columns that share a place: 2 for nibbles, `columns / 2` apart, else 1. The last four steps are
a Triton function of their own, `write_tile`, which the per-token quantizer calls too.

Results equal `reference.py` bit for bit, but for the sign of zeros in `FLOAT32`. A NaN is NaN in
`FLOAT32` and code 0 in `INT8` and `NIBBLES`, where the definition leaves it to the machine's
conversion. Entries of the index are not checked.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.torch_operator import define_operator
from mergequant_vllm.rounding import largest_code, smallest_code

if TYPE_CHECKING:
    import triton.language as tl

# Columns of a tile.
TILE_COLUMNS = 1024
# Tokens of a tile where there are many: they share what is read of the index and the offset.
TILE_ROWS = 4
MANY_TOKENS = 512


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
        tokens: rows from here on are not stored.
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
    # Clamping first gives the same codes; sums beyond 2^23 have no room for a fraction, so that the
    # addition rounds to an integer, half to even.
    bounded = tl.clamp(z, SMALLEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    laid_out = tl.where((column < K)[None, :, :], (bounded + 12582912.0) - 12582912.0, 0.0)
    if codes.dtype.element_ty != tl.float32:
        laid_out = tl.where(laid_out == laid_out, laid_out, 0.0).to(tl.int8)
    if PARTS == 2:
        low, high = tl.split(tl.permute(laid_out, (0, 2, 1)))
        laid_out = ((low & 15) | (high << 4)).to(tl.uint8, bitcast=True)
    else:
        laid_out = tl.reshape(laid_out, (ROWS, WIDTH))
    inside = (rows < tokens)[:, None] & (place < width)[None, :]
    tl.store(codes + rows[:, None] * width + place[None, :], laid_out, mask=inside)


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
    """Codes of one tile; source of the Triton kernel.

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


_WRITE_TILE = write_tile


def build_write_tile() -> Any:
    """`write_tile` as a Triton function; interpreted if TRITON_INTERPRET=1 by now."""
    import triton
    import triton.language

    # Triton looks up what a function calls, `tl` too, among its module's globals.
    globals()["tl"] = triton.language
    return triton.jit(_WRITE_TILE)


@functools.cache
def build_kernel() -> Any:
    """The Triton kernel of `static_codes_program`; interpreted if TRITON_INTERPRET=1 by now."""
    import triton

    globals()["write_tile"] = build_write_tile()
    return triton.jit(static_codes_program, do_not_specialize=["tokens"])


def rows_of(x: Tensor) -> Tensor:
    """`x` [..., K] as [tokens, K] whose rows are contiguous; copied only if it has to be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def parts_of(layout: str) -> int:
    """How many columns share a place in the `CodeLayout` of this value."""
    return 2 if layout == CodeLayout.NIBBLES.value else 1


def empty_codes(x: Tensor, K: int, layout: str, columns: int) -> Tensor:
    """Room for codes [..., columns] of `x` [..., n] in the `CodeLayout` of this value."""
    parts = parts_of(layout)
    if columns < K or columns % parts:
        raise ValueError(f"{columns} columns do not hold {K} codes as {layout}, {parts} a place.")
    dtype = torch.uint8 if parts == 2 else getattr(torch, layout)
    return x.new_empty((*x.shape[:-1], columns // parts), dtype=dtype)


def launch_constants(tokens: int, bits: int, layout: str, columns: int) -> dict[str, Any]:
    """What the kernel is compiled for: its own constants, then Triton's options."""
    parts = parts_of(layout)
    return {
        "ROWS": TILE_ROWS if tokens >= MANY_TOKENS else 1,
        "PARTS": parts,
        "WIDTH": min(TILE_COLUMNS, power_of_two(columns)) // parts,
        "SMALLEST": smallest_code(bits),
        "LARGEST": largest_code(bits),
        "num_warps": 4,
        # The references round after every product and every sum.
        "enable_fp_fusion": False,
    }


def power_of_two(least: int) -> int:
    """The smallest one that is not less than `least`."""
    return 1 << (least - 1).bit_length()


def _columns_before_padding(normed: Tensor, index: Tensor | None) -> int:
    return normed.shape[-1] if index is None else index.shape[0]


def _launch(
    normed: Tensor,
    bits: int,
    layout: str,
    index: Tensor | None,
    offset: Tensor | None,
    columns: int,
) -> Tensor:
    codes = _result_shape(normed, bits, layout, index, offset, columns)
    x = rows_of(normed)
    tokens = x.shape[0]
    K = _columns_before_padding(normed, index)
    constants = launch_constants(tokens, bits, layout, columns)
    grid = (-(-tokens // constants["ROWS"]), -(-codes.shape[-1] // constants["WIDTH"]))
    build_kernel()[grid](x, index, offset, codes, tokens, x.stride(0), K, columns, **constants)
    return codes


def _result_shape(
    normed: Tensor,
    bits: int,
    layout: str,
    index: Tensor | None,
    offset: Tensor | None,
    columns: int,
) -> Tensor:
    return empty_codes(normed, _columns_before_padding(normed, index), layout, columns)


static_codes_triton = define_operator("static_codes_triton", _launch, _result_shape)


def static_codes(
    normed: Tensor,
    bits: int,
    layout: CodeLayout,
    *,
    index: Tensor | None = None,
    offset: Tensor | None = None,
    columns: int | None = None,
) -> Tensor:
    """As `reference.static_codes`, bit for bit; opaque to torch.compile."""
    columns = columns or _columns_before_padding(normed, index)
    codes: Tensor = static_codes_triton(normed, bits, layout.value, index, offset, columns)
    return codes

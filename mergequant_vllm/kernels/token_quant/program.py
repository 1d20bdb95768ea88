"""The Triton program of per-token quantization: rotation, extreme values, step, zero point, codes.

A program takes a token, as parts and places (see `norm_round.program`).

See `triton_mode` for who may import this module.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mergequant_vllm.kernels.hadamard.program import rotate_row
from mergequant_vllm.kernels.norm_round.program import rounded, write_tile


@triton.jit
def load_rotated(
    x: tl.tensor,
    start: tl.tensor,
    K: tl.tensor,
    columns: tl.tensor,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    ROOT: tl.constexpr,
) -> tl.tensor:
    """Return places `start` to `start + WIDTH` of the row at `x`: float32 [PARTS, WIDTH].

    Values from K on are 0. Rotated in blocks of 2^STAGES, of which a part and WIDTH are multiples;
    ROOT is 1 / sqrt(block).
    """
    width = columns // PARTS
    place = start + tl.arange(0, WIDTH)[None, :]
    column = tl.arange(0, PARTS)[:, None] * width + place
    z = tl.load(x + column, mask=(place < width) & (column < K), other=0).to(tl.float32)
    if STAGES > 0:
        z = rotate_row(tl.reshape(z, (PARTS * WIDTH,)), PARTS * WIDTH, STAGES, ROOT)
        z = tl.reshape(z, (PARTS, WIDTH))
    return z


@triton.jit
def largest_magnitude(z: tl.tensor) -> tl.tensor:
    """Return the bits of max |z| as an int32: they order as the magnitudes do, NaN above all."""
    # `tl.max` itself is not interpreted if Triton was imported before TRITON_INTERPRET was set; by
    # a function of our own the interpreter reduces element by element.
    bits = z.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.reduce(bits, None, tl.standard._elementwise_max)


@triton.jit
def ordered_bits(z: tl.tensor) -> tl.tensor:
    """Return the bits of z as int32 that order as the values do, NaN at either end."""
    bits = z.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_of(ordered: tl.tensor) -> tl.tensor:
    """Return the float32 of `ordered_bits`."""
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def smallest(z: tl.tensor) -> tl.tensor:
    """Return `ordered_bits` of the smallest of z."""
    return tl.reduce(ordered_bits(z), None, tl.standard._elementwise_min)


@triton.jit
def largest(z: tl.tensor) -> tl.tensor:
    """Return `ordered_bits` of the largest of z."""
    return tl.reduce(ordered_bits(z), None, tl.standard._elementwise_max)


@triton.jit(do_not_specialize=["tokens"])
def token_codes_program(
    x: tl.tensor,
    clip: tl.tensor,
    codes: tl.tensor,
    step: tl.tensor,
    zero: tl.tensor | None,
    tokens: tl.tensor,
    stride: tl.tensor,
    K: tl.tensor,
    columns: tl.tensor,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
    ROOT: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    SHARE: tl.constexpr,
    LEAST_STEP: tl.constexpr,
) -> None:
    """Write the codes, the step and, if asked, the zero point of one token.

    Args:
        x: [tokens, K] of any floating dtype, rows `stride` apart.
        clip: float32 [1].
        codes: see `write_tile`, as are the arguments not named here.
        step: float32 [tokens].
        zero: int32 [tokens], or None: codes without zero points.
        PARTS: columns that share a place.
        WIDTH: places of a chunk, a power of two.
        WHOLE: one chunk has all places.
        STAGES: see `load_rotated`; 0: no rotation.
        ROOT: see `load_rotated`.
        SHARE: the step's share of the clipped largest magnitude, or of the clipped range.
        LEAST_STEP: a step is at least this.
    """
    # 64 bits: tokens * K passes 2^31 in long prefills.
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.arange(0, 1)
    x += row * stride
    width = columns // PARTS
    # Bits of the largest magnitude, or of the ends of the range of the values and 0.
    low, high = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    if WHOLE:
        z = load_rotated(x, 0, K, columns, PARTS, WIDTH, STAGES, ROOT)
        if zero is None:
            high = largest_magnitude(z)
        else:
            low, high = tl.minimum(low, smallest(z)), tl.maximum(high, largest(z))
    else:
        for start in range(0, width, WIDTH):
            chunk = load_rotated(x, start, K, columns, PARTS, WIDTH, STAGES, ROOT)
            if zero is None:
                high = tl.maximum(high, largest_magnitude(chunk))
            else:
                low, high = tl.minimum(low, smallest(chunk)), tl.maximum(high, largest(chunk))
    ratio = tl.load(clip)
    lowest = value_of(low)
    size = high.to(tl.float32, bitcast=True)
    if zero is not None:
        size = size - lowest
    token_step = size * ratio * SHARE
    token_step = tl.maximum(token_step, LEAST_STEP, propagate_nan=tl.PropagateNan.ALL)
    tl.store(step + row, token_step)
    # IEEE division; a plain one is approximate on GPUs.
    inverse = tl.math.div_rn(1.0, token_step)
    token_zero = rounded(SMALLEST - lowest * ratio * inverse, SMALLEST, LARGEST)
    if zero is not None:
        tl.store(zero + row, tl.where(token_zero == token_zero, token_zero, 0.0).to(tl.int32))
    if WHOLE:
        z = z * inverse
        if zero is not None:
            z = z + token_zero
        write_tile(z[None, :, :], codes, rows, 0, tokens, K, columns, SMALLEST, LARGEST)
    else:
        for start in range(0, width, WIDTH):
            chunk = load_rotated(x, start, K, columns, PARTS, WIDTH, STAGES, ROOT) * inverse
            if zero is not None:
                chunk = chunk + token_zero
            write_tile(chunk[None, :, :], codes, rows, start, tokens, K, columns, SMALLEST, LARGEST)

"""Dynamic per-token quantization as one Triton kernel: rotation, largest value, step, codes.

A program takes a token, as parts and places (see `norm_round.triton`). A row of up to `ROW_COLUMNS`
stays in registers from its load to its codes; a longer one is read, and rotated, in chunks and
twice. Nibbles of halves that are not whole blocks of the rotation are packed by a second kernel.

Results equal `reference.py` bit for bit, but for the sign of zeros in `FLOAT32`. A NaN among the
values of a token makes its step and all its codes NaN; an infinity makes its step infinite, its own
code NaN and the others 0. Such a code is NaN in `FLOAT32` and 0 in `INT8` and `NIBBLES`, where the
definition leaves it to the machine's conversion.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.hadamard.triton import build_rotate_row, rotate_row
from mergequant_vllm.kernels.norm_round.triton import (
    build_write_tile,
    empty_codes,
    parts_of,
    power_of_two,
    rows_of,
    static_codes,
    write_tile,
)
from mergequant_vllm.kernels.torch_operator import define_operator
from mergequant_vllm.rounding import SMALLEST_STEP, largest_code, smallest_code

if TYPE_CHECKING:
    import triton.language as tl

# 32 values a thread, with 16 warps. 64 and the rotation's copies of them would leave the registers.
ROW_COLUMNS = 16384


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
    """Places `start` to `start + WIDTH` of the row at `x`: float32 [PARTS, WIDTH], 0 from K on.

    Rotated in blocks of 2^STAGES, of which a part and WIDTH are multiples; ROOT is 1 / sqrt(block).
    """
    width = columns // PARTS
    place = start + tl.arange(0, WIDTH)[None, :]
    column = tl.arange(0, PARTS)[:, None] * width + place
    z = tl.load(x + column, mask=(place < width) & (column < K), other=0).to(tl.float32)
    if STAGES > 0:
        z = rotate_row(tl.reshape(z, (PARTS * WIDTH,)), PARTS * WIDTH, STAGES, ROOT)
        z = tl.reshape(z, (PARTS, WIDTH))
    return z


def largest_magnitude(z: tl.tensor) -> tl.tensor:
    """Bits of max |z| as an int32: they order as the magnitudes do, NaN above all."""
    # `tl.max` itself is not interpreted if Triton was imported before TRITON_INTERPRET was set; by
    # a function of our own the interpreter reduces element by element.
    bits = z.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.reduce(bits, None, tl.standard._elementwise_max)


def token_codes_program(
    x: tl.tensor,
    clip: tl.tensor,
    codes: tl.tensor,
    step: tl.tensor,
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
    """Codes and step of one token; source of the Triton kernel.

    Args:
        x: [tokens, K] of any floating dtype, rows `stride` apart.
        clip: float32 [1].
        codes: see `write_tile`, as are the arguments not named here.
        step: float32 [tokens].
        PARTS: columns that share a place.
        WIDTH: places of a chunk, a power of two.
        WHOLE: one chunk has all places.
        STAGES: see `load_rotated`; 0: no rotation.
        ROOT: see `load_rotated`.
        SHARE: 1 / LARGEST, the step's share of the clipped largest magnitude.
        LEAST_STEP: a step is at least this.
    """
    # 64 bits: tokens * K passes 2^31 in long prefills.
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.arange(0, 1)
    x += row * stride
    width = columns // PARTS
    if WHOLE:
        z = load_rotated(x, 0, K, columns, PARTS, WIDTH, STAGES, ROOT)
        largest = largest_magnitude(z)
    else:
        largest = tl.full((), 0, tl.int32)
        for start in range(0, width, WIDTH):
            chunk = load_rotated(x, start, K, columns, PARTS, WIDTH, STAGES, ROOT)
            largest = tl.maximum(largest, largest_magnitude(chunk))
    token_step = largest.to(tl.float32, bitcast=True) * tl.load(clip) * SHARE
    token_step = tl.maximum(token_step, LEAST_STEP, propagate_nan=tl.PropagateNan.ALL)
    tl.store(step + row, token_step)
    # IEEE division; a plain one is approximate on GPUs.
    inverse = tl.math.div_rn(1.0, token_step)
    if WHOLE:
        z = (z * inverse)[None, :, :]
        write_tile(z, codes, rows, 0, tokens, K, columns, SMALLEST, LARGEST)
    else:
        for start in range(0, width, WIDTH):
            chunk = load_rotated(x, start, K, columns, PARTS, WIDTH, STAGES, ROOT)
            chunk = (chunk * inverse)[None, :, :]
            write_tile(chunk, codes, rows, start, tokens, K, columns, SMALLEST, LARGEST)


_SOURCES = (load_rotated, largest_magnitude)


@functools.cache
def build_kernel() -> Any:
    """The Triton kernel of `token_codes_program`; interpreted if TRITON_INTERPRET=1 by now."""
    import triton
    import triton.language

    # Triton looks up what a function calls, `tl` too, among its module's globals.
    globals().update({source.__name__: triton.jit(source) for source in _SOURCES})
    globals().update(
        tl=triton.language,
        rotate_row=build_rotate_row(),
        write_tile=build_write_tile(),
    )
    return triton.jit(token_codes_program, do_not_specialize=["tokens"])


def launch_constants(bits: int, layout: str, hadamard: int | None, columns: int) -> dict[str, Any]:
    """What the kernel is compiled for: its own constants, then Triton's options."""
    parts, block = parts_of(layout), hadamard or 1
    whole = power_of_two(columns)
    chunk = min(whole, max(ROW_COLUMNS, parts * block))
    return {
        "PARTS": parts,
        "WIDTH": chunk // parts,
        "WHOLE": chunk == whole,
        "STAGES": block.bit_length() - 1,
        "ROOT": 1 / math.sqrt(block),
        "SMALLEST": smallest_code(bits),
        "LARGEST": largest_code(bits),
        "SHARE": 1 / largest_code(bits),
        "LEAST_STEP": SMALLEST_STEP,
        # 16 values a thread; 32 in the longest rows.
        "num_warps": min(max(chunk // 512, 1), 16),
        # The references round after every product and every sum.
        "enable_fp_fusion": False,
    }


def _launch(
    x: Tensor, clip: Tensor, bits: int, layout: str, hadamard: int | None, columns: int
) -> tuple[Tensor, Tensor]:
    codes, step = _result_shapes(x, clip, bits, layout, hadamard, columns)
    if codes.shape[-1] % (hadamard or 1) and layout == CodeLayout.NIBBLES.value:
        wide, step = _launch(x, clip, bits, CodeLayout.INT8.value, hadamard, columns)
        return static_codes(wide, bits, CodeLayout.NIBBLES), step
    rows = rows_of(x)
    tokens, K = rows.shape
    constants = launch_constants(bits, layout, hadamard, columns)
    build_kernel()[(tokens,)](
        rows, clip, codes, step, tokens, rows.stride(0), K, columns, **constants
    )
    return codes, step


def _result_shapes(
    x: Tensor, clip: Tensor, bits: int, layout: str, hadamard: int | None, columns: int
) -> tuple[Tensor, Tensor]:
    K, block = x.shape[-1], hadamard or 1
    if block & (block - 1) or K % block:
        raise ValueError(f"A Hadamard block is a power of two that divides K = {K}, not {block}.")
    step = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return empty_codes(x, K, layout, columns), step


token_codes_triton = define_operator("token_codes_triton", _launch, _result_shapes)


def token_codes(
    x: Tensor,
    clip: Tensor,
    bits: int,
    layout: CodeLayout,
    *,
    hadamard: int | None = None,
    columns: int | None = None,
    zero_points: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `reference.token_codes`, bit for bit; opaque to torch.compile."""
    if zero_points:
        raise ValueError("The Triton quantizer writes no zero points yet.")
    columns = columns or x.shape[-1]
    codes, step = token_codes_triton(x, clip, bits, layout.value, hadamard, columns)
    return codes, step, None

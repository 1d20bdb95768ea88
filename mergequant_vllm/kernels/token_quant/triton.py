"""Dynamic per-token quantization as one Triton kernel, see `program`.

A row of up to `ROW_COLUMNS`
stays in registers from its load to its codes; a longer one is read, and rotated, in chunks and
twice. Nibbles of halves that are not whole blocks of the rotation are packed by a second kernel.

Results equal `reference.py` bit for bit, but for the sign of zeros in `FLOAT32`. A NaN among the
values of a token makes its step and all its codes NaN; an infinity makes its step infinite, its own
code NaN and the others 0. Such a code is NaN in `FLOAT32` and 0 in `INT8` and `NIBBLES`, where the
definition leaves it to the machine's conversion.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.norm_round.triton import (
    empty_codes,
    parts_of,
    power_of_two,
    rows_of,
    static_codes,
)
from mergequant_vllm.kernels.torch_operator import define_operator
from mergequant_vllm.rounding import SMALLEST_STEP, largest_code, smallest_code

# 32 values a thread, with 16 warps. 64 and the rotation's copies of them would leave the registers.
ROW_COLUMNS = 16384


def launch_constants(
    bits: int, layout: str, hadamard: int | None, columns: int, zero_points: bool
) -> dict[str, Any]:
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
        "SHARE": 1 / (2**bits - 1 if zero_points else largest_code(bits)),
        "LEAST_STEP": SMALLEST_STEP,
        # 16 values a thread; 32 in the longest rows.
        "num_warps": min(max(chunk // 512, 1), 16),
        # The references round after every product and every sum.
        "enable_fp_fusion": False,
    }


def _launch(
    x: Tensor,
    clip: Tensor,
    bits: int,
    layout: str,
    hadamard: int | None,
    columns: int,
    zero_points: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from mergequant_vllm.kernels.token_quant.program import token_codes_program

    codes, step, zero = _result_shapes(x, clip, bits, layout, hadamard, columns, zero_points)
    if codes.shape[-1] % (hadamard or 1) and layout == CodeLayout.NIBBLES.value:
        int8 = CodeLayout.INT8.value
        wide, step, zero = _launch(x, clip, bits, int8, hadamard, columns, zero_points)
        return static_codes(wide, bits, CodeLayout.NIBBLES), step, zero
    rows = rows_of(x)
    tokens, K = rows.shape
    constants = launch_constants(bits, layout, hadamard, columns, zero_points)
    token_codes_program[(tokens,)](
        rows,
        clip,
        codes,
        step,
        zero if zero_points else None,
        tokens,
        rows.stride(0),
        K,
        columns,
        **constants,
    )
    return codes, step, zero


def _result_shapes(
    x: Tensor,
    clip: Tensor,
    bits: int,
    layout: str,
    hadamard: int | None,
    columns: int,
    zero_points: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for codes, steps and zero points; without zero points an empty tensor."""
    K, block = x.shape[-1], hadamard or 1
    if block & (block - 1) or K % block:
        raise ValueError(f"A Hadamard block is a power of two that divides K = {K}, not {block}.")
    step = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    zeros = (*x.shape[:-1], 1) if zero_points else (0,)
    return empty_codes(x, K, layout, columns), step, x.new_empty(zeros, dtype=torch.int32)


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
    """Compute `reference.token_codes`, bit for bit; opaque to torch.compile."""
    columns = columns or x.shape[-1]
    form = (bits, layout.value, hadamard, columns, zero_points)
    codes, step, zero = token_codes_triton(x, clip, *form)
    return codes, step, zero if zero_points else None

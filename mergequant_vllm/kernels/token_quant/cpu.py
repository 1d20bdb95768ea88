"""Per-token quantization on CPU by the native kernels: rotation, step and codes in one pass."""

import torch
from torch import Tensor

from mergequant_vllm.kernels import native_library as native
from mergequant_vllm.kernels.codes import CodeLayout, as_rows
from mergequant_vllm.kernels.torch_operator import define_operator


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
    """Compute `reference.token_codes`, in layout INT8 alone."""
    if layout is not CodeLayout.INT8:
        raise ValueError(f"The native quantizer writes int8 codes, not {layout.value}.")
    columns = columns or x.shape[-1]
    codes, step, zero = token_quant_native(x, clip, bits, hadamard or 0, columns, zero_points)
    return codes, step, zero if zero_points else None


def token_quant(
    x: Tensor, clip: Tensor, bits: int, block: int, columns: int, zero_points: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, steps and zero points; without zero points an empty tensor stands for them."""
    codes, step, zero = _fake(x, clip, bits, block, columns, zero_points)
    rows = as_rows(x, alignment=1)
    if rows.shape[0]:
        native.call(
            "mq_token_quant",
            rows.data_ptr(),
            native.TYPES[rows.dtype],
            rows.stride(0),
            rows.shape[0],
            rows.shape[1],
            clip.data_ptr(),
            bits,
            block,
            codes.data_ptr(),
            columns,
            step.data_ptr(),
            zero.data_ptr() if zero_points else None,
        )
    return codes, step, zero


def _fake(
    x: Tensor, clip: Tensor, bits: int, block: int, columns: int, zero_points: bool
) -> tuple[Tensor, Tensor, Tensor]:
    codes = x.new_empty((*x.shape[:-1], columns), dtype=torch.int8)
    step = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    zeros = (*x.shape[:-1], 1) if zero_points else (0,)
    return codes, step, x.new_empty(zeros, dtype=torch.int32)


token_quant_native = define_operator("token_quant_native", token_quant, _fake)

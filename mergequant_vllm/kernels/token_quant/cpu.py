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
    """As `reference.token_codes`, in layout INT8 alone."""
    if layout is not CodeLayout.INT8:
        raise ValueError(f"The native quantizer writes int8 codes, not {layout.value}.")
    if zero_points:
        raise ValueError("The native quantizer writes no zero points yet.")
    codes, step = token_quant_native(x, clip, bits, hadamard or 0, columns or x.shape[-1])
    return codes, step, None


def _token_quant(
    x: Tensor, clip: Tensor, bits: int, block: int, columns: int
) -> tuple[Tensor, Tensor]:
    rows = as_rows(x, alignment=1)
    codes = x.new_empty((*x.shape[:-1], columns), dtype=torch.int8)
    step = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
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
        )
    return codes, step


def _fake(x: Tensor, clip: Tensor, bits: int, block: int, columns: int) -> tuple[Tensor, Tensor]:
    codes = x.new_empty((*x.shape[:-1], columns), dtype=torch.int8)
    return codes, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


token_quant_native = define_operator("token_quant_native", _token_quant, _fake)

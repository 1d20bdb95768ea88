"""Gather and rounding of a migrated norm's output on CPU by the native kernels, in one pass.

For eager mode; under torch.compile the compiler puts `reference` into the norm's own loop.
"""

import torch
from torch import Tensor

from mergequant_vllm.kernels import native_library as native
from mergequant_vllm.kernels.codes import CodeLayout, as_rows
from mergequant_vllm.kernels.torch_operator import define_operator


def static_codes(
    normed: Tensor,
    bits: int,
    layout: CodeLayout,
    *,
    index: Tensor | None = None,
    offset: Tensor | None = None,
    columns: int | None = None,
) -> Tensor:
    """Compute `reference.static_codes`, in layout INT8 alone."""
    if layout is not CodeLayout.INT8:
        raise ValueError(f"The native quantizer writes int8 codes, not {layout.value}.")
    width = columns or (normed.shape[-1] if index is None else len(index))
    codes: Tensor = static_round_native(normed, index, offset, bits, width)
    return codes


def _static_round(
    normed: Tensor, index: Tensor | None, offset: Tensor | None, bits: int, columns: int
) -> Tensor:
    rows = as_rows(normed, alignment=1)
    codes = normed.new_empty((*normed.shape[:-1], columns), dtype=torch.int8)
    if rows.shape[0]:
        native.call(
            "mq_static_round",
            rows.data_ptr(),
            native.TYPES[rows.dtype],
            rows.stride(0),
            rows.shape[0],
            rows.shape[1],
            None if index is None else index.data_ptr(),
            None if offset is None else offset.data_ptr(),
            bits,
            codes.data_ptr(),
            rows.shape[1] if index is None else len(index),
            columns,
        )
    return codes


def _fake(
    normed: Tensor, index: Tensor | None, offset: Tensor | None, bits: int, columns: int
) -> Tensor:
    return normed.new_empty((*normed.shape[:-1], columns), dtype=torch.int8)


static_round_native = define_operator("static_round_native", _static_round, _fake)

"""The mixing of heads on CPU by the native kernels: one pass where PyTorch makes many."""

import torch
from torch import Tensor

from mergequant_vllm.kernels import native_library as native
from mergequant_vllm.kernels.codes import as_rows
from mergequant_vllm.kernels.hadamard.reference import odd_factor
from mergequant_vllm.kernels.torch_operator import define_operator


def _mix(x: Tensor, count: int, width: int) -> Tensor:
    """Return `reference.mix_heads`, bit for bit."""
    size = count * width
    if x.shape[-1] % size:
        raise ValueError(f"{x.shape[-1]} channels are not whole runs of {count} heads of {width}.")
    rows = as_rows(x if x.shape[-1] == size else x.reshape(-1, size), alignment=1)
    y = _fake(x, count, width)
    if rows.shape[0]:
        mixing = odd_factor(count // (count & -count), x.device)
        native.call(
            "mq_mix_heads",
            rows.data_ptr(),
            native.TYPES[rows.dtype],
            rows.stride(0),
            rows.shape[0],
            count,
            width,
            mixing.data_ptr(),
            y.data_ptr(),
        )
    return y


def _fake(x: Tensor, count: int, width: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


mix_heads_native = define_operator("mix_heads_native", _mix, _fake)

"""Per-token quantization written so that TorchInductor makes one GPU kernel of it.

Inductor splits a reduction over more than 8192 channels between kernels when there are few tokens,
and fuses an elementwise operation with a reduction only where both are as wide. So the row is taken
in two halves: the largest of each pair first, then the reduction over half the channels, then each
half's codes. Equal to `reference.py`; with the activation function in front still one kernel.

With zero points there is no such form: Inductor would contract the product and the sum before the
rounding into one operation. The reference is then an operator that no compiler looks into.
"""

import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout, lay_out, pack_nibbles
from mergequant_vllm.kernels.token_quant import reference
from mergequant_vllm.kernels.torch_operator import define_operator
from mergequant_vllm.rounding import round_to_codes


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
    """Compute `reference.token_codes`."""
    channels = x.shape[-1]
    columns = columns or channels
    if zero_points:
        codes, step, zero = token_codes_asymmetric(x, clip, bits, layout.value, hadamard, columns)
        return codes, step, zero
    if hadamard is not None or channels % 2:
        return reference.token_codes(x, clip, bits, layout, hadamard=hadamard, columns=columns)
    z = x.to(torch.float32)
    first, second = z[..., : channels // 2], z[..., channels // 2 :]
    largest = torch.maximum(first.abs(), second.abs()).amax(dim=-1, keepdim=True)
    step = reference.token_step(largest, clip, bits)
    reciprocal = step.reciprocal()
    low, high = (round_to_codes(half * reciprocal, bits) for half in (first, second))
    if layout is CodeLayout.NIBBLES and columns == channels:
        return pack_nibbles(low.to(torch.int8), high.to(torch.int8)), step, None
    if layout is CodeLayout.FLOAT32:
        return lay_out(torch.cat((low, high), dim=-1), layout, columns), step, None
    codes = torch.cat((low.to(torch.int8), high.to(torch.int8)), dim=-1)
    return lay_out(codes, layout, columns), step, None


def _asymmetric(
    x: Tensor, clip: Tensor, bits: int, layout: str, hadamard: int | None, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    codes, step, zero = reference.token_codes(
        x, clip, bits, CodeLayout(layout), hadamard=hadamard, columns=columns, zero_points=True
    )
    assert zero is not None
    return codes, step, zero


def _fake(
    x: Tensor, clip: Tensor, bits: int, layout: str, hadamard: int | None, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    parts = 2 if layout == CodeLayout.NIBBLES.value else 1
    dtype = {"float32": torch.float32, "int8": torch.int8, "nibbles": torch.uint8}[layout]
    codes = x.new_empty((*x.shape[:-1], columns // parts), dtype=dtype)
    step = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return codes, step, torch.empty_like(step, dtype=torch.int32)


token_codes_asymmetric = define_operator("token_codes_asymmetric", _asymmetric, _fake)

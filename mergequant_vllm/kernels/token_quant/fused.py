"""Per-token quantization written so that TorchInductor makes one GPU kernel of it.

Inductor splits a reduction over more than 8192 channels between kernels when there are few tokens,
and fuses an elementwise operation with a reduction only where both are as wide. So the row is taken
in two halves: the largest of each pair first, then the reduction over half the channels, then each
half's codes. Equal to `reference.py`; with the activation function in front still one kernel.
"""

import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout, lay_out, pack_nibbles
from mergequant_vllm.kernels.token_quant import reference
from mergequant_vllm.rounding import SMALLEST_STEP, largest_code, round_to_codes


def token_codes(
    x: Tensor,
    clip: Tensor,
    bits: int,
    layout: CodeLayout,
    *,
    hadamard: int | None = None,
    columns: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.token_codes`."""
    channels = x.shape[-1]
    columns = columns or channels
    if hadamard is not None or channels % 2:
        return reference.token_codes(x, clip, bits, layout, hadamard=hadamard, columns=columns)
    z = x.to(torch.float32)
    first, second = z[..., : channels // 2], z[..., channels // 2 :]
    largest = torch.maximum(first.abs(), second.abs()).amax(dim=-1, keepdim=True)
    step = (largest * clip * (1 / largest_code(bits))).clamp(min=SMALLEST_STEP)
    reciprocal = step.reciprocal()
    low, high = (round_to_codes(half * reciprocal, bits) for half in (first, second))
    if layout is CodeLayout.NIBBLES and columns == channels:
        return pack_nibbles(low.to(torch.int8), high.to(torch.int8)), step
    if layout is CodeLayout.FLOAT32:
        return lay_out(torch.cat((low, high), dim=-1), layout, columns), step
    codes = torch.cat((low.to(torch.int8), high.to(torch.int8)), dim=-1)
    return lay_out(codes, layout, columns), step

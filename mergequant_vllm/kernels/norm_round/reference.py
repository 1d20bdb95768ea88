"""Definition of the static path's rounding (paper Eq. 4).

The norm's stored multiplier already carries 1/s, so its output is in units of the activation step
and quantization is rounding alone: no scale, no reduction.
"""

import torch
from torch import Tensor

from mergequant_vllm.rounding import round_to_codes


def static_codes(normed: Tensor, bits: int, code_dtype: torch.dtype) -> Tensor:
    """Round a migrated norm's output to activation codes.

    Args:
        normed: [..., K], the norm's output with multiplier norm / s, any floating dtype.
        bits: width of an activation code.
        code_dtype: what the kernel behind takes.

    Returns:
        `code_dtype` [..., K], integer-valued.
    """
    return round_to_codes(normed.to(torch.float32), bits).to(code_dtype)

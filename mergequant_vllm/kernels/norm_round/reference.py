"""Definition of the static path's rounding (paper Eq. 4) and of reconstruction's gather (4.2).

    code[t, k] = round(x[t, index[k]] + offset[k])

The norm's stored multiplier already carries 1/s, so its output is in units of the activation step
and quantization is rounding alone: no scale, no reduction. Without reconstruction the index is the
identity and is left out; without staggered rounding so is the offset.
"""

import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout, lay_out
from mergequant_vllm.rounding import round_to_codes


def static_codes(
    normed: Tensor,
    bits: int,
    layout: CodeLayout,
    *,
    index: Tensor | None = None,
    offset: Tensor | None = None,
    columns: int | None = None,
) -> Tensor:
    """Round a migrated norm's output to activation codes.

    Args:
        normed: [..., n], the norm's output with multiplier norm / s, any floating dtype.
        bits: width of an activation code.
        layout: what the kernel behind takes.
        index: int32 [K], the channel of `normed` that each column reads; None: K = n, identity.
        offset: float32 [K], added before rounding, in activation steps; None: 0.
        columns: K as the kernel wants it, at least K, padded with codes 0; None: K.

    Returns:
        codes [..., columns] in `layout`.
    """
    x = normed.to(torch.float32)
    if index is not None:
        x = x.index_select(-1, index)
    if offset is not None:
        x = x + offset
    codes = round_to_codes(x, bits)
    return lay_out(codes, layout, columns or codes.shape[-1])

"""Definition of the dynamic per-token quantization (paper 4.2, o and down).

    z = x, or x rotated by the block-diagonal Hadamard matrix
    step[t] = clip * max_k |z[t, k]| / Q_b        code[t, k] = round(z[t, k] / step[t])

Divisions are products with a reciprocal, float32(1 / Q_b) and float32(1 / step), one division a
token: a product rounds alike everywhere, a vectorised or compiled division does not.
"""

import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout, lay_out
from mergequant_vllm.kernels.hadamard.reference import rotate
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
    """Quantize each token with its own step.

    Args:
        x: [..., K], any floating dtype. Under tensor parallelism K is the rank's shard and the
            step is the shard's own.
        clip: float32 [1], ratio in (0, 1]; the step covers clip * max|z|.
        bits: width of an activation code.
        layout: what the kernel behind takes.
        hadamard: block of the rotation, a power of two that divides K; None: no rotation.
        columns: K as the kernel wants it, at least K, padded with codes 0; None: K.

    Returns:
        codes [..., columns] in `layout`, and steps float32 [..., 1].
    """
    z = x.to(torch.float32)
    if hadamard is not None:
        z = rotate(z, hadamard)
    largest = z.abs().amax(dim=-1, keepdim=True)
    step = (largest * clip * (1 / largest_code(bits))).clamp(min=SMALLEST_STEP)
    codes = round_to_codes(z * step.reciprocal(), bits)
    return lay_out(codes, layout, columns or codes.shape[-1]), step

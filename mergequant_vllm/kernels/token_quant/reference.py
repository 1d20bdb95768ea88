"""Definition of the dynamic per-token quantization (paper 4.2, o and down).

    z = x, or x rotated by the block-diagonal Hadamard matrix
    step[t] = clip * max_k |z[t, k]| / Q_b        code[t, k] = round(z[t, k] / step[t])

With zero points (asymmetric activations) a token's codes cover the range of its values and 0:

    low[t] = min(0, min_k z[t, k])                high[t] = max(0, max_k z[t, k])
    step[t] = (high[t] - low[t]) * clip / (2^b - 1)
    zero[t] = round(-2^(b-1) - low[t] * clip / step[t])
    code[t, k] = round(z[t, k] / step[t] + zero[t])

Divisions are products with a reciprocal, float32(1 / Q_b), float32(1 / (2^b - 1)) and
float32(1 / step), one division a token: a product rounds alike everywhere, a vectorised or compiled
division does not. Every operation rounds to float32 by itself: a product and a sum contracted into
one would give other codes.
"""

import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout, lay_out
from mergequant_vllm.kernels.hadamard.reference import rotate
from mergequant_vllm.rounding import SMALLEST_STEP, largest_code, round_to_codes, smallest_code


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
    """Quantize each token with its own step, and its own zero point if asked.

    Args:
        x: [..., K], any floating dtype. Under tensor parallelism K is the rank's shard and the
            step is the shard's own.
        clip: float32 [1], ratio in (0, 1]; the step covers clip * max|z|, or that share of the
            range.
        bits: width of an activation code.
        layout: what the kernel behind takes.
        hadamard: block of the rotation, a power of two that divides K; None: no rotation.
        columns: K as the kernel wants it, at least K, padded with codes 0; None: K.
        zero_points: codes have a zero point per token.

    Returns:
        codes [..., columns] in `layout`, steps float32 [..., 1], and zero points int32 [..., 1] in
        the range of the codes, or None.
    """
    z = x.to(torch.float32)
    if hadamard is not None:
        z = rotate(z, hadamard)
    if zero_points:
        step, zero = token_range(z, clip, bits)
        codes = round_to_codes(z * step.reciprocal() + zero, bits)
        return lay_out(codes, layout, columns or codes.shape[-1]), step, zero.to(torch.int32)
    step = token_step(z.abs().amax(dim=-1, keepdim=True), clip, bits)
    codes = round_to_codes(z * step.reciprocal(), bits)
    return lay_out(codes, layout, columns or codes.shape[-1]), step, None


def token_step(largest: Tensor, clip: Tensor, bits: int) -> Tensor:
    """Return the steps of tokens whose largest magnitudes are `largest`: float32 [..., 1]."""
    return (largest * clip * (1 / largest_code(bits))).clamp(min=SMALLEST_STEP)


def token_range(z: Tensor, clip: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return steps and zero points of tokens z float32 [..., K]: float32 [..., 1] each.

    Zero points are integer-valued.
    """
    low = z.amin(dim=-1, keepdim=True).clamp(max=0.0)
    high = z.amax(dim=-1, keepdim=True).clamp(min=0.0)
    step = ((high - low) * clip * (1 / (2**bits - 1))).clamp(min=SMALLEST_STEP)
    zero = round_to_codes(smallest_code(bits) - (low * clip) * step.reciprocal(), bits)
    return step, zero

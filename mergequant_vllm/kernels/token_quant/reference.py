"""Definition of the dynamic per-token quantization (paper 4.2, o and down).

    step[t] = clip * max_k |x[t, k]| / Q_b        code[t, k] = round(x[t, k] / step[t])

The quotient is taken as a product with the reciprocal of the step, one division a token, in
float32: a product rounds alike everywhere, a vectorised division does not.
"""

import torch
from torch import Tensor

from mergequant_vllm.rounding import SMALLEST_STEP, largest_code, round_to_codes


def token_codes(
    x: Tensor, clip: Tensor, bits: int, code_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Quantize each token with its own step.

    Args:
        x: [..., K], any floating dtype. Under tensor parallelism K is the rank's shard and the
            step is the shard's own.
        clip: float32 [1], ratio in (0, 1]; the step covers clip * max|x|.
        bits: width of an activation code.
        code_dtype: what the kernel behind takes.

    Returns:
        codes `code_dtype` [..., K], integer-valued, and steps float32 [..., 1].
    """
    x = x.to(torch.float32)
    largest = x.abs().amax(dim=-1, keepdim=True)
    step = (largest * clip / largest_code(bits)).clamp(min=SMALLEST_STEP)
    return round_to_codes(x * step.reciprocal(), bits).to(code_dtype), step

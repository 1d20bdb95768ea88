"""THE rounding rule: half to even, then clamp to the two's-complement range.

Every code in the project, of a weight or of an activation, made offline or while serving, comes
from these functions or is tested to equal them.
"""

import torch
from torch import Tensor

# The smallest activation or weight step. A row of zeros has no scale of its own; this floor keeps
# its reciprocal finite in float32, so that 0 / step is 0 and not NaN.
SMALLEST_STEP = 2.0**-100

_FP16_LARGEST = 65280.0  # largest bfloat16 value that float16 can hold
_FP16_SMALLEST_NORMAL = 2.0**-14


def largest_code(bits: int) -> int:
    """Q_b = 2^(b-1) - 1: 7 for 4 bits (paper Eq. 1)."""
    return int(2 ** (bits - 1) - 1)


def smallest_code(bits: int) -> int:
    """-2^(b-1): -8 for 4 bits."""
    return int(-(2 ** (bits - 1)))


def largest_magnitude(bits: int, zero_point: bool) -> int:
    """Largest magnitude of a code of `bits` bits, less its zero point if it has one."""
    return int(2**bits - 1 if zero_point else 2 ** (bits - 1))


def round_to_codes(x: Tensor, bits: int) -> Tensor:
    """Round `x`, given in units of its step, to integer codes.

    Args:
        x: any shape, floating point.
        bits: width of a code.

    Returns:
        same shape and dtype as `x`, integer-valued in [-2^(b-1), 2^(b-1) - 1].
    """
    return torch.clamp(torch.round(x), smallest_code(bits), largest_code(bits))


def round_to_codes_(x: Tensor, bits: int) -> Tensor:
    """Round as `round_to_codes`, in the memory of `x`, which is returned."""
    return x.round_().clamp_(smallest_code(bits), largest_code(bits))


def round_to_16_bit(x: Tensor) -> Tensor:
    """The value nearest to `x` that bfloat16 and float16 both hold exactly.

    vLLM may load one checkpoint in bfloat16, float16 or float32; a number rounded here is the same
    number in all three.

    Args:
        x: any shape, floating point; magnitudes are brought below float16's largest.

    Returns:
        same shape and dtype as `x`. Magnitudes below 2^-24 become zero.
    """
    bounded = x.clamp(-_FP16_LARGEST, _FP16_LARGEST)
    return bounded.to(torch.float16).to(torch.bfloat16).to(x.dtype)


def round_to_16_bit_normal(x: Tensor) -> Tensor:
    """Round as `round_to_16_bit`, to at least float16's smallest normal magnitude (2^-14).

    Zero stays zero. Processors that flush subnormal numbers cannot change these values.
    """
    raised = torch.copysign(x.abs().clamp(min=_FP16_SMALLEST_NORMAL), x)
    return round_to_16_bit(torch.where(x == 0, x, raised))

"""How many columns a kernel can sum before its integers no longer fit."""

from mergequant_vllm.kernels.linear.spec import LinearSpec
from mergequant_vllm.rounding import largest_magnitude

INT32 = 2**31 - 1


def largest_product(spec: LinearSpec, weight_as: int = 0) -> int:
    """Return the largest magnitude of one product of a linear's sums.

    A code less a zero point is at most 2^b - 1 from 0, and 2^(b-1) without a zero point.

    Args:
        spec: the linear.
        weight_as: magnitude of a weight as the kernel multiplies it, where that may be larger.
    """
    weight = largest_magnitude(spec.weight_bits, spec.zero_points)
    return max(weight, weight_as) * largest_magnitude(spec.activation_bits, spec.token_zero_points)


def exact_columns(spec: LinearSpec, largest_sum: int, weight_as: int = 0) -> int:
    """Return how many columns sum to a magnitude of at most `largest_sum`, whatever the codes.

    Args:
        spec: the linear.
        largest_sum: the largest integer that the kernel's sums hold exactly.
        weight_as: see `largest_product`.
    """
    return largest_sum // largest_product(spec, weight_as)

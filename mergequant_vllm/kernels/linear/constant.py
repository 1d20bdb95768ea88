"""What a linear adds to its products, whatever its input."""

import torch
from torch import Tensor


def constant_of(bias: Tensor | None, output_offset: Tensor | None) -> Tensor | None:
    """Return what a linear adds to every token's outputs.

    Args:
        bias: [N], floating point, or None.
        output_offset: [N], floating point, or None.

    Returns:
        their sum, rounded once in float32 [N]; None where both are.
    """
    there = [x.to(torch.float32) for x in (bias, output_offset) if x is not None]
    return there[0] + there[1] if len(there) == 2 else next(iter(there), None)

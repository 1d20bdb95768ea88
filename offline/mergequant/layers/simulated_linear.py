"""A quantized linear in floating point: what training goes through, and what no checkpoint holds.

Its products are rounded where the server's are exact integers; `quantized_linear` is the server's.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class FixedWeight(nn.Module):
    """A weight [out, K] that is not trained."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self) -> Tensor:
        """[out, K]."""
        return self.weight


class SimulatedLinear(nn.Module):
    """y = read(x) @ W^T + b.

    Args:
        read: input [..., n] to what the product sees of it, [..., K].
        weight: module that gives W [out, K].
        bias: [out] or None.
    """

    def __init__(
        self, read: Callable[[Tensor], Tensor], weight: nn.Module, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.read = read
        self.given = weight
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] to y [..., out], same dtype."""
        return F.linear(self.read(x), self.given(), self.bias)

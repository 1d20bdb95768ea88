"""A linear whose weights stay packed in its kernel's layout and whose product is one operator."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mergequant_vllm.kernels.linear.spec import PreparedLinear


class PackedLinear(PreparedLinear):
    """Tensors in the kernel's layout, and the operator that multiplies by them.

    Args:
        columns: see `PreparedLinear`.
        weight: packed codes.
        weight_step: float32.
        zero_points: or None.
        bias: [N] in the model's dtype, or None.
        operator: called with the codes, these tensors with the token's step before the bias, and
            `form`.
        form: the operator's other arguments, the output's dtype last.
    """

    weight: Tensor
    weight_step: Tensor
    zero_points: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        columns: int,
        weight: Tensor,
        weight_step: Tensor,
        zero_points: Tensor | None,
        bias: Tensor | None,
        operator: Callable[..., Any],
        form: tuple[Any, ...],
    ) -> None:
        super().__init__()
        self.columns = columns
        self.register_buffer("weight", weight)
        self.register_buffer("weight_step", weight_step)
        self.register_buffer("zero_points", zero_points)
        self.register_buffer("bias", bias)
        self._operator = operator
        self._form = form

    def forward(self, codes: Tensor, token_step: Tensor | None, add_bias: bool) -> Tensor:
        """As `reference`, bit for bit."""
        y: Tensor = self._operator(
            codes,
            self.weight,
            self.weight_step,
            self.zero_points,
            token_step,
            self.bias if add_bias else None,
            *self._form,
        )
        return y

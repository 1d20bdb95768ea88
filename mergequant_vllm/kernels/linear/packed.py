"""A linear whose weights stay packed in its kernel's layout and whose product is one operator."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mergequant_vllm.kernels.linear.spec import PreparedLinear, StoredLinear


class PackedLinear(PreparedLinear):
    """Tensors in the kernel's layout, and the operator that multiplies by them.

    Args:
        columns: see `PreparedLinear`.
        stored: the linear, for its constants.
        weight: packed codes.
        weight_step: float32.
        zero_points: int8, or None.
        weight_sums: int32, what a token's zero point is multiplied by, or None.
        spans: int32, where the spans of the weight steps end, or None.
        operator: called with the codes, these tensors, the token's step and zero point, the
            constant, and `form`.
        form: the operator's other arguments, the output's dtype last.
    """

    weight: Tensor
    weight_step: Tensor
    zero_points: Tensor | None
    weight_sums: Tensor | None
    spans: Tensor | None

    def __init__(
        self,
        columns: int,
        stored: StoredLinear,
        weight: Tensor,
        weight_step: Tensor,
        zero_points: Tensor | None,
        weight_sums: Tensor | None,
        spans: Tensor | None,
        operator: Callable[..., Any],
        form: tuple[Any, ...],
    ) -> None:
        super().__init__()
        self.columns = columns
        self.register_buffer("weight", weight)
        self.register_buffer("weight_step", weight_step)
        self.register_buffer("zero_points", zero_points)
        self.register_buffer("weight_sums", weight_sums)
        self.register_buffer("spans", spans)
        self.keep_constants(stored)
        self._operator = operator
        self._form = form

    def forward(
        self, codes: Tensor, token_step: Tensor | None, token_zero: Tensor | None, add_bias: bool
    ) -> Tensor:
        """Compute `reference`, bit for bit."""
        y: Tensor = self._operator(
            codes,
            self.weight,
            self.weight_step,
            self.zero_points,
            self.weight_sums,
            self.spans,
            token_step,
            token_zero,
            self.constant(add_bias),
            *self._form,
        )
        return y

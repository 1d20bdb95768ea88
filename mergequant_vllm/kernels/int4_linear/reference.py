"""Definition of the INT4 linear (paper Eq. 5), in exact integers.

    y[t, j] = (sum_k x_int[t, k] * w_int[j, k]) * token_step[t] * weight_step[j] + bias[j]

The sum is an integer. It is multiplied in float32, the token's step first, then the channel's, and
rounded once to the output's dtype after the bias. Every kernel keeps this order.
"""

import torch
from torch import Tensor

from mergequant_vllm.kernels.int4_linear.spec import LinearSpec
from mergequant_vllm.packing import unpack


def integer_products(codes: Tensor, weight_codes: Tensor) -> Tensor:
    """Exact sums of products.

    Args:
        codes: activation codes [..., K], integer-valued, any dtype.
        weight_codes: [N, K], integer-valued, any dtype.

    Returns:
        int64 [..., N].
    """
    if codes.device.type == "cpu":
        return codes.to(torch.int64) @ weight_codes.to(torch.int64).T
    # No 64-bit integer GEMM on GPUs; float64 sums are exact below 2^53.
    return (codes.to(torch.float64) @ weight_codes.to(torch.float64).T).to(torch.int64)


def scale_products(
    products: Tensor,
    weight_step: Tensor,
    token_step: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The epilogue: integer sums to the linear's output.

    Args:
        products: [..., N], integer-valued; below 2^24 in magnitude, so exact in float32.
        weight_step: float32 [N].
        token_step: float32 [..., 1], or None for static activations.
        bias: [N] or None.

    Returns:
        `out_dtype` [..., N].
    """
    y = products.to(torch.float32)
    if token_step is not None:
        y = y * token_step
    y = y * weight_step
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(out_dtype)


class ReferenceLinear:
    """The definition as a selectable kernel: slow, obvious, on any device."""

    name = "reference"
    code_dtype = torch.int8

    def refusal(self, spec: LinearSpec) -> str | None:
        """Nothing is refused."""
        return None

    def prepare(self, weight_packed: Tensor, spec: LinearSpec) -> Tensor:
        """int32 [N, words] as stored to int8 codes [N, K]."""
        return unpack(weight_packed, spec.weight_bits, spec.in_features)

    def linear(
        self,
        codes: Tensor,
        weight: Tensor,
        weight_step: Tensor,
        token_step: Tensor | None,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """See the module's docstring."""
        products = integer_products(codes, weight)
        return scale_products(products, weight_step, token_step, bias, out_dtype)

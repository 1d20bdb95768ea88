"""Definition of the INT4 linear (paper Eq. 5), in exact integers.

Per output channel j, with weight codes w, zero points z (0 if there are none) and activation
codes x:

    y[t, j] = (sum_k x[t, k] * (w[j, k] - z[j])) * token_step[t] * weight_step[j] + bias[j]

and with groups g of input channels, each with its own step and zero point:

    y[t, j] = (sum_g (sum_{k in g} x[t, k] * (w[j, k] - z[j, g])) * weight_step[j, g])
              * token_step[t] + bias[j]

The innermost sums are integers. They are rounded to float32 once and multiplied in float32, in the
order written (per channel: the token's step first; groups: added in ascending order, then the
token's step); the result is rounded once to the output's dtype, after the bias. Kernels of ours
equal this bit for bit; kernels of others say where they round differently.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout, Writer
from mergequant_vllm.kernels.linear.spec import LinearSpec, PreparedLinear, StoredLinear
from mergequant_vllm.packing import unpack

Products = Callable[[Tensor, Tensor], Tensor]


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


def integer_linear(
    codes: Tensor,
    weight: Tensor,
    weight_step: Tensor,
    group_size: int | None,
    token_step: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    multiply: Products = integer_products,
) -> Tensor:
    """The linear, group by group; see the module's docstring.

    Args:
        codes: activation codes [..., K], integer-valued, of a dtype that `multiply` takes.
        weight: weight codes minus zero points [N, K], likewise.
        weight_step: float32 [N, groups].
        group_size: input channels that share a step; None: all.
        token_step: float32 [..., 1], or None for static activations.
        bias: [N] or None.
        multiply: exact sums of products of codes [..., k] and weights [N, k]: [..., N].

    Returns:
        `out_dtype` [..., N].
    """
    parts = group_slices(weight.shape[1], group_size)
    sums = [multiply(codes[..., part], weight[:, part]) for part in parts]
    if group_size is None:
        return scale_products(sums[0], weight_step[:, 0], token_step, bias, out_dtype)
    return scale_group_products(sums, weight_step, token_step, bias, out_dtype)


def scale_products(
    products: Tensor,
    weight_step: Tensor,
    token_step: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The epilogue without groups: integer sums to the linear's output.

    Args:
        products: [..., N], integer-valued.
        weight_step: float32 [N].
        token_step: float32 [..., 1], or None for static activations.
        bias: [N] or None.

    Returns:
        `out_dtype` [..., N].
    """
    y = products.to(torch.float32)
    if token_step is not None:
        y = y * token_step
    return _finish(y * weight_step, None, bias, out_dtype)


def scale_group_products(
    products: list[Tensor],
    weight_step: Tensor,
    token_step: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The epilogue with groups: `products` one [..., N] a group, `weight_step` [N, groups]."""
    y = products[0].to(torch.float32) * weight_step[:, 0]
    for group, sums in enumerate(products[1:], start=1):
        y = y + sums.to(torch.float32) * weight_step[:, group]
    return _finish(y, token_step, bias, out_dtype)


def _finish(
    y: Tensor, token_step: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    if token_step is not None:
        y = y * token_step
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(out_dtype)


def centred_codes(stored: StoredLinear, spec: LinearSpec) -> Tensor:
    """Weight codes minus their zero points: int16 [N, K]."""
    codes = unpack(stored.weight_packed, spec.weight_bits, spec.in_features)
    return centre(codes, stored.zero_points, spec.group_size)


def centre(codes: Tensor, zero_points: Tensor | None, group_size: int | None) -> Tensor:
    """Weight codes int8 [N, K] minus zero points int8 [N, groups]: int16 [N, K]."""
    wide = codes.to(torch.int16)
    if zero_points is None:
        return wide
    columns = codes.shape[1]
    zeros = zero_points.to(torch.int16).repeat_interleave(group_size or columns, dim=1)
    return wide - zeros[:, :columns]


def group_slices(columns: int, group_size: int | None) -> list[slice]:
    """The input channels of each group; the last group may be short."""
    size = group_size or columns
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


class ReferenceLinear:
    """The definition as a selectable kernel: slow, obvious, on any device."""

    name = "reference"
    layout = CodeLayout.INT8
    writer = Writer.REFERENCE

    def refusal(self, spec: LinearSpec) -> str | None:
        """Nothing is refused."""
        return None

    def prepare(self, stored: StoredLinear, spec: LinearSpec) -> PreparedLinear:
        """int16 [N, K]: codes minus zero points."""
        return CentredLinear(stored, spec)


class CentredLinear(PreparedLinear):
    """A layer whose codes minus zero points are held in a wide dtype: weight [N, K].

    Args:
        dtype: of the codes, wide enough for 9 bits.
        multiply: see `integer_linear`; takes weights of that dtype.
    """

    weight: Tensor
    weight_step: Tensor
    bias: Tensor | None

    def __init__(
        self,
        stored: StoredLinear,
        spec: LinearSpec,
        dtype: torch.dtype = torch.int16,
        multiply: Products = integer_products,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.columns = spec.in_features
        self._multiply = multiply
        self.register_buffer("weight", centred_codes(stored, spec).to(dtype))
        self.register_buffer("weight_step", stored.weight_step)
        self.register_buffer("bias", stored.bias)

    def forward(self, codes: Tensor, token_step: Tensor | None, add_bias: bool) -> Tensor:
        """See the module's docstring."""
        return integer_linear(
            codes,
            self.weight,
            self.weight_step,
            self.spec.group_size,
            token_step,
            self.bias if add_bias else None,
            self.spec.dtype,
            self._multiply,
        )

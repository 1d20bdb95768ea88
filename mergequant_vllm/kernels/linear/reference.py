"""Definition of the INT4 linear (paper Eq. 5), in exact integers.

Per output channel j, with weight codes w and zero points z, activation codes x and zero points u of
the tokens (a zero point is 0 where there is none):

    y[t, j] = (sum_k (x[t, k] - u[t]) * (w[j, k] - z[j])) * token_step[t] * weight_step[j]
              + constant[j]

and with spans g of input channels (`spans`: groups of one length, or segments of any), each with
its own step and zero point:

    y[t, j] = (sum_g (sum_{k in g} (x[t, k] - u[t]) * (w[j, k] - z[j, g])) * weight_step[j, g])
              * token_step[t] + constant[j]

where constant[j] = float32(bias[j]) + float32(output_offset[j]), once, in float32, of those that
there are; without the bias, the output offset alone.

The innermost sums are integers. They are rounded to float32 once and multiplied in float32, in the
order written (per channel: the token's step first; spans: added in ascending order, then the
token's step); the result is rounded once to the output's dtype, after the constant. Kernels of ours
equal this bit for bit; kernels of others say where they round differently. A kernel may take

    sum_k (x[k] - u) * (w[k] - z) = sum_k x[k] * (w[k] - z) - u * S,  S = sum_k (w[k] - z)

over the columns that there are: columns of padding count for nothing.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout, CodeWriter
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
    spans: Sequence[slice] | None,
    token_step: Tensor | None,
    token_zero: Tensor | None,
    constant: Tensor | None,
    out_dtype: torch.dtype,
    multiply: Products = integer_products,
) -> Tensor:
    """Return the linear's output, span by span; see the module's docstring.

    Args:
        codes: activation codes [..., K], integer-valued, of a dtype that `multiply` takes.
        weight: weight codes minus zero points [N, K], likewise.
        weight_step: float32 [N, spans].
        spans: columns of each step, see `span_slices`; None: one step per output channel.
        token_step: float32 [..., 1], or None for static activations.
        token_zero: int32 [..., 1], or None where tokens have no zero points.
        constant: float32 [N] or None.
        out_dtype: dtype of the result.
        multiply: exact sums of products of codes [..., k] and weights [N, k]: [..., N].

    Returns:
        `out_dtype` [..., N].
    """
    if token_zero is not None:
        codes = codes - token_zero  # int8 codes become int32, floating ones keep their dtype
    if spans is None:
        sums = multiply(codes[..., : weight.shape[1]], weight)
        return scale_products(sums, weight_step[:, 0], token_step, constant, out_dtype)
    total = None
    for number, span in enumerate(spans):  # one at a time: there may be hundreds
        sums = multiply(codes[..., span], weight[:, span])
        scaled = sums.to(torch.float32) * weight_step[:, number]
        total = scaled if total is None else total + scaled
    assert total is not None  # a linear has columns
    return _finish(total, token_step, constant, out_dtype)


def scale_products(
    products: Tensor,
    weight_step: Tensor,
    token_step: Tensor | None,
    constant: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Return the output of a linear with one step per output channel, from its integer sums.

    Args:
        products: [..., N], integer-valued.
        weight_step: float32 [N].
        token_step: float32 [..., 1], or None for static activations.
        constant: float32 [N] or None.
        out_dtype: dtype of the result.

    Returns:
        `out_dtype` [..., N].
    """
    y = products.to(torch.float32)
    if token_step is not None:
        y = y * token_step
    return _finish(y * weight_step, None, constant, out_dtype)


def _finish(
    y: Tensor, token_step: Tensor | None, constant: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    if token_step is not None:
        y = y * token_step
    if constant is not None:
        y = y + constant
    return y.to(out_dtype)


def centred_codes(stored: StoredLinear, spec: LinearSpec) -> Tensor:
    """Return weight codes minus their zero points: int16 [N, K]."""
    codes = unpack(stored.weight_packed, spec.weight_bits, spec.in_features)
    return centre(codes, stored.zero_points, spec.spans)


def centre(codes: Tensor, zero_points: Tensor | None, spans: Sequence[slice] | None) -> Tensor:
    """Return weight codes int8 [N, K] minus zero points int8 [N, spans]: int16 [N, K]."""
    wide = codes.to(torch.int16)
    if zero_points is None:
        return wide
    lengths = [codes.shape[1]] if spans is None else [span.stop - span.start for span in spans]
    repeats = torch.tensor(lengths, dtype=torch.int64, device=codes.device)
    return wide - zero_points.to(torch.int16).repeat_interleave(repeats, dim=1)


def weight_sums(stored: StoredLinear, spec: LinearSpec) -> Tensor | None:
    """Return S[j, g], what a token's zero point is multiplied by: int32 [N, spans].

    None where tokens have no zero points.
    """
    if not spec.token_zero_points:
        return None
    codes = centred_codes(stored, spec)
    spans = spec.spans or [slice(0, spec.in_features)]
    return torch.stack([codes[:, span].sum(1, dtype=torch.int32) for span in spans], dim=1)


class ReferenceLinear:
    """The definition as a selectable kernel: slow, obvious, on any device."""

    name = "reference"
    layout = CodeLayout.INT8
    writer = CodeWriter.REFERENCE

    def refusal(self, spec: LinearSpec) -> str | None:
        """Return None: the definition refuses nothing."""
        return None

    def prepare(self, stored: StoredLinear, spec: LinearSpec) -> PreparedLinear:
        """int16 [N, K]: codes minus zero points."""
        return CentredLinear(stored, spec)


class CentredLinear(PreparedLinear):
    """A layer whose codes minus zero points are held in a wide dtype: weight [N, K].

    Args:
        dtype: of the codes, wide enough for 9 bits and a sign.
        multiply: see `integer_linear`; takes weights of that dtype.
    """

    weight: Tensor
    weight_step: Tensor

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
        self._spans = spec.spans
        self._multiply = multiply
        self.register_buffer("weight", centred_codes(stored, spec).to(dtype))
        self.register_buffer("weight_step", stored.weight_step)
        self.keep_constants(stored)

    def forward(
        self, codes: Tensor, token_step: Tensor | None, token_zero: Tensor | None, add_bias: bool
    ) -> Tensor:
        """See the module's docstring."""
        return integer_linear(
            codes,
            self.weight,
            self.weight_step,
            self._spans,
            token_step,
            token_zero,
            self.constant(add_bias),
            self.spec.dtype,
            self._multiply,
        )

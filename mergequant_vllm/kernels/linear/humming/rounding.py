"""What humming's kernels make of exact integer sums, rounded where they round.

From the kernels' source (humming-kernels 0.1.10 to 0.1.19). Step per output channel:

    t = fl16(fl32(fl32(sum) * input_scale))             first rounding to 16 bits
    y = fl16(t * weight_scale)                          second; with a bias, one fused
    y = fl16(t * weight_scale + bias)                   multiply-add instead

From 0.1.17 on, INT8 on compute capability 10.0 and 11.0 (`scale_first`) has one rounding less:

    y = fl16(fl32(fl32(fl32(sum) * input_scale) * weight_scale)), and y = fl16(y + bias)

Step per group (INT8 alone), the groups cut into runs of at most 64 channels, 128 on compute
capability 9.0 (there 0.1.10 adds in another order with few tokens):

    a = fl32(weight_scale * fl32(sum of a run) + a)     fused, runs in ascending order
    y = fl16(fl32(a * input_scale)), and y = fl16(y + bias)

`fl16` is the model's dtype, float16 or bfloat16; the scales are exact in it, and the bias is the
reference's constant rounded to it. This is the sum of one
thread block (`use_batch_invariant`). With stream-K, blocks may share an output: each rounds its
part as above, and the parts are added in 16 bits; if there are more than three, or from compute
capability 9.0 on, in no fixed order.

`power_of_two` says how a linear's steps are divided between `input_scale` and `weight_scale`.
"""

import math

import torch
from torch import Tensor

from mergequant_vllm.kernels.linear.reference import centred_codes, integer_products
from mergequant_vllm.kernels.linear.spec import LinearSpec, StoredLinear

_FP16_LARGEST = 65504


def largest_sum(stored: StoredLinear, spec: LinearSpec) -> int:
    """An upper bound of |sum_k x[k] * (w[j, k] - z[j])| over all outputs j and all codes x."""
    per_output = centred_codes(stored, spec).abs().sum(dim=1, dtype=torch.int64)
    return int(per_output.max()) << (spec.activation_bits - 1)


def power_of_two(stored: StoredLinear, spec: LinearSpec) -> int:
    """p: humming gets input_scale * 2^-p and weight_scale * 2^p.

    * bfloat16 has float32's range: p = 0, as for groups, whose sums stay in float32.
    * float16, static: the smallest p >= 0 for which no sum overflows, whatever the activations.
      Nothing is lost: sums are multiples of 2^-p, and float16 holds those to 2^-24.
    * float16, dynamic: no bound of the token's step is known. The smallest p >= 0 for which every
      weight_scale is at least 1, so that t is not larger than y: t overflows only if y does.
      Where t is subnormal, y is off by at most 2^-25 * weight_scale.

    Raises:
        ValueError: some weight_scale * 2^p is not a float16.
    """
    if spec.dtype != torch.float16 or spec.groups > 1:
        return 0
    if spec.dynamic:
        used = centred_codes(stored, spec).ne(0).any(dim=1, keepdim=True) & (stored.weight_step > 0)
        least = float(stored.weight_step.where(used, math.inf).min())
        # least = m * 2^e with 0.5 <= m < 1
        shift = max(0, 1 - math.frexp(least)[1]) if math.isfinite(least) else 0
        while shift and float(stored.weight_step.max()) * 2**shift > _FP16_LARGEST:
            shift -= 1
    else:
        bound, shift = largest_sum(stored, spec), 0
        while bound > _FP16_LARGEST * 2**shift:
            shift += 1
    scaled = stored.weight_step * 2.0**shift
    if not torch.equal(scaled.to(spec.dtype).to(torch.float32), scaled):
        raise ValueError(
            f"humming applies weight steps in float16, and {float(scaled.abs().max())} "
            f"(a step times 2^{shift}) is not one: serve with --dtype bfloat16"
        )
    return shift


def multiply_add(a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """a * b + c rounded once to `dtype`.

    Exact for factors of together at most 53 bits, such as two float16, or a float16 and a float32.
    """
    product = a.to(torch.float64) * b.to(torch.float64)
    addend = c.to(torch.float64)
    total = product + addend
    # The part of the sum that float64 rounded off (Knuth's two-sum).
    back = total - product
    error = (product - (total - back)) + (addend - back)
    wide = _to_odd(total, error)
    if dtype == torch.float32:
        return wide.to(dtype)
    # PyTorch converts float64 to 16 bits by way of float32.
    narrow = wide.to(torch.float32)
    return _to_odd(narrow, wide - narrow.to(torch.float64)).to(dtype)


def _to_odd(nearest: Tensor, error: Tensor) -> Tensor:
    """`nearest` + `error` rounded to odd, which a later rounding to fewer bits does not notice."""
    bits = nearest.view(torch.int64 if nearest.dtype == torch.float64 else torch.int32)
    inexact = torch.isfinite(nearest) & (error != 0) & ((bits & 1) == 0)
    infinity = torch.full_like(nearest, math.inf)
    towards = torch.where(error > 0, infinity, -infinity)
    return torch.where(inexact, torch.nextafter(nearest, towards), nearest)


def emulate_epilogue(
    products: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    *,
    scale_first: bool = False,
) -> Tensor:
    """The epilogue of a step per output channel.

    Args:
        products: [..., N], integer-valued.
        weight_scale: [N] in the output's dtype.
        input_scale: float32 [1] or [..., 1].
        bias: [N] in the output's dtype, or None.
        scale_first: see the module's docstring.

    Returns:
        [..., N] in the dtype of `weight_scale`.
    """
    dtype = weight_scale.dtype
    scaled = products.to(torch.float32) * input_scale
    if scale_first:
        return _add_bias((scaled * weight_scale.to(torch.float32)).to(dtype), bias)
    first = scaled.to(dtype)
    if bias is not None:
        return multiply_add(first, weight_scale, bias, dtype)
    return (first.to(torch.float32) * weight_scale.to(torch.float32)).to(dtype)


def emulate_group_epilogue(
    products: list[Tensor], weight_scale: Tensor, input_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """The epilogue of a step per group: `products` one [..., N] a run, `weight_scale` [N, runs]."""
    total = torch.zeros_like(products[0], dtype=torch.float32)
    for run, sums in enumerate(products):
        step = weight_scale[:, run].to(torch.float32)
        total = multiply_add(step, sums.to(torch.float32), total, torch.float32)
    return _add_bias((total * input_scale).to(weight_scale.dtype), bias)


def _add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else multiply_add(y, torch.ones_like(y), bias, y.dtype)


def emulate(
    stored: StoredLinear,
    spec: LinearSpec,
    codes: Tensor,
    token_step: Tensor | None,
    add_bias: bool,
    *,
    scale_first: bool = False,
) -> Tensor:
    """A whole linear as `humming-int4` and `humming-int8` compute it.

    Args:
        stored: the linear.
        spec: its spec, dtype float16 or bfloat16.
        codes: integer-valued [..., K or more], what is beyond K is not read.
        token_step: float32 [..., 1], or None for static activations.
        add_bias: add the stored bias; the output offset is added in any case.
        scale_first: see the module's docstring.

    Returns:
        [..., N] in the spec's dtype.
    """
    shift = power_of_two(stored, spec)
    one = torch.ones(1, dtype=torch.float32, device=codes.device)
    input_scale = (one if token_step is None else token_step) * 2.0**-shift
    scale = (stored.weight_step * 2.0**shift).to(spec.dtype)
    constant = stored.constant(add_bias)
    bias = None if constant is None else constant.to(spec.dtype)
    weight = centred_codes(stored, spec)
    if spec.groups == 1:
        products = integer_products(codes[..., : spec.in_features], weight)
        return emulate_epilogue(products, scale[:, 0], input_scale, bias, scale_first=scale_first)
    length = 128 if spec.capability in range(90, 100) else 64
    runs = [
        (slice(start, min(start + length, part.stop)), group)
        for group, part in enumerate(spec.spans or [])
        for start in range(part.start, part.stop, length)
    ]
    sums = [integer_products(codes[..., run], weight[:, run]) for run, _ in runs]
    return emulate_group_epilogue(sums, scale[:, [group for _, group in runs]], input_scale, bias)

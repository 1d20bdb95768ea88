"""Error bounds of the kernels, as their docstrings state them: checks against the definition.

A check returns None, or a clause that names the first output beyond the bound.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant_vllm.kernels.linear.humming.rounding import emulate
from mergequant_vllm.kernels.linear.reference import centred_codes, integer_products
from mergequant_vllm.kernels.linear.spec import LinearSpec, StoredLinear

# Half the distance of neighbouring numbers, relative; half the smallest subnormal number.
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
TINY = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25, torch.float32: 2.0**-150}


@dataclass(frozen=True)
class Product:
    """One call of a kernel and what the definition makes of it.

    Attributes:
        codes: int8 [M, K].
        token_step: float32 [M, 1] or None.
        add_bias: whether the bias was asked for.
        expected: [M, N], the definition's output.
        result: [M, N], the kernel's.
    """

    spec: LinearSpec
    stored: StoredLinear
    codes: Tensor
    token_step: Tensor | None
    add_bias: bool
    expected: Tensor
    result: Tensor

    def magnitudes(self) -> Tensor:
        """int64 [M, N], sum_k |x[t, k] * w[j, k]|."""
        weight = centred_codes(self.stored, self.spec)
        return integer_products(self.codes.to(torch.int16).abs(), weight.abs())


def check(kernel: str, product: Product) -> str | None:
    """Check `product.result` against the error bound of `kernel`."""
    if product.result.shape != product.expected.shape:
        return f"shape {list(product.result.shape)}, not {list(product.expected.shape)}"
    if product.result.dtype != product.expected.dtype:
        return f"dtype {product.result.dtype}, not {product.expected.dtype}"
    return _CHECKS.get(kernel, equal)(product)


def equal(product: Product) -> str | None:
    """Compare bit for bit."""
    return first_difference(product.result, product.expected)


def first_difference(result: Tensor, expected: Tensor) -> str | None:
    """The first place where two tensors differ; NaN differs from everything."""
    if torch.equal(result, expected):
        return None
    different = (result != expected).nonzero()
    place = tuple(different[0].tolist())
    count = f"{len(different)} of {result.numel()} differ"
    return f"{count}, first at {list(place)}: {result[place].item()}, not {expected[place].item()}"


def _marlin(product: Product) -> str | None:
    magnitudes = product.magnitudes()
    if product.token_step is None and not product.add_bias:
        exact = magnitudes <= 2**16
        if bool(exact.all()):
            return equal(product)
        wrong = first_difference(product.result[exact], product.expected[exact])
        if wrong is not None:
            return f"among sums that must be exact {wrong}"
    # At most as many thread blocks share an output as the GPU has processors.
    shares = 1024
    if product.codes.is_cuda:
        shares = torch.cuda.get_device_properties(product.codes.device).multi_processor_count
    slack = (shares + 6) * 2.0**-24 * magnitudes.double() * _steps(product)
    return _within(product, slack, roundings=2 if product.add_bias else 1)


def _cutlass(product: Product) -> str | None:
    if product.token_step is None:
        return equal(product)
    exact = _exact(product)
    slack = 2.0**-22 * exact.abs()
    if product.add_bias:
        slack = slack + 2.0**-23 * (exact + _bias(product)).abs()
    return _within(product, slack, roundings=1)


def _within(product: Product, slack: Tensor, roundings: int) -> str | None:
    """Whether the result is within `slack` of the exact value, before its roundings."""
    exact = _exact(product)
    dtype = product.spec.dtype
    largest = exact.abs() + slack
    allowed = slack + UNIT[dtype] * largest + TINY[dtype]
    value = exact
    if product.add_bias:
        value = exact + _bias(product)
        total = value.abs() + allowed
        allowed = allowed + UNIT[dtype] * total * (roundings - 1) + UNIT[dtype] * total
    error = (product.result.double() - value).abs()
    # Beyond the dtype's range both are infinite.
    wrong = ~(error <= allowed) & (product.result != product.expected)
    if not bool(wrong.any()):
        return None
    place = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{int(wrong.sum())} of {wrong.numel()} beyond the error bound, first at {list(place)}: "
        f"{product.result[place].item()} for {value[place].item():.9g} "
        f"(allowed {allowed[place].item():.3g})"
    )


def _exact(product: Product) -> Tensor:
    """float64 [M, N] without the bias."""
    weight = centred_codes(product.stored, product.spec)
    return integer_products(product.codes, weight).double() * _steps(product)


def _steps(product: Product) -> Tensor:
    """float64, broadcast over [M, N]; kernels that are checked so take no groups."""
    steps = product.stored.weight_step[:, 0].double()
    return steps if product.token_step is None else steps * product.token_step.double()


def _bias(product: Product) -> Tensor:
    if product.stored.bias is None:
        raise ValueError("a bias was asked for and there is none")
    return product.stored.bias.double()


def _humming(product: Product, *, int8: bool) -> str | None:
    """Compare with the library's own emulation, which rounds where it does."""
    spec = product.spec
    # From 0.1.17 on, INT8 on these GPUs multiplies in another order.
    scale_first = int8 and spec.capability is not None and 100 <= spec.capability < 120
    expected = emulate(
        product.stored,
        spec,
        product.codes,
        product.token_step,
        product.add_bias,
        scale_first=scale_first,
    )
    return first_difference(product.result, expected)


_CHECKS: dict[str, Callable[[Product], str | None]] = {
    "marlin-int8": _marlin,
    "cutlass-int8": _cutlass,
    "humming-int4": functools.partial(_humming, int8=False),
    "humming-int8": functools.partial(_humming, int8=True),
}

"""CPU kernels against the definition in 64-bit integers: equal, to the last bit."""

import itertools

import pytest
import torch
from torch import Tensor

from mergequant_vllm.kernels.linear.cpu.fp32 import CpuFp32Linear, exact_channels
from mergequant_vllm.kernels.linear.reference import ReferenceLinear, integer_products
from mergequant_vllm.kernels.linear.spec import LinearKernel
from tests.mergequant_vllm.kernels.made import (
    MadeLinear,
    make_linear,
    make_spec,
    make_token_step,
    random_codes,
    run,
)

KERNELS: list[LinearKernel] = [CpuFp32Linear(), ReferenceLinear()]
SIZES = [(1, 1, 1), (2, 7, 43), (7, 129, 127), (64, 128, 128), (128, 43, 352), (129, 64, 4099)]


def spelled_out(made: MadeLinear, x: Tensor, token_step: Tensor | None, bias: bool) -> Tensor:
    """The definition, output by output and group by group, in Python's integers and float32."""
    spec, stored = made.spec, made.stored
    y = torch.empty(x.shape[0], spec.out_features)
    size = spec.group_size or spec.in_features
    for t, j in itertools.product(range(x.shape[0]), range(spec.out_features)):
        total = torch.zeros(())
        for g in range(spec.groups):
            part = slice(g * size, (g + 1) * size)
            zero = 0 if stored.zero_points is None else int(stored.zero_points[j, g])
            pairs = zip(x[t, part].tolist(), made.codes[j, part].tolist(), strict=True)
            products = torch.tensor(float(sum(a * (w - zero) for a, w in pairs)))
            if token_step is not None and spec.group_size is None:
                products = products * token_step[t, 0]
            total = total + products * stored.weight_step[j, g]
        if token_step is not None and spec.group_size is not None:
            total = total * token_step[t, 0]
        if bias and stored.bias is not None:
            total = total + stored.bias[j].float()
        y[t, j] = total
    return y.to(spec.dtype)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("kind", ["random", "lowest", "highest"])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_integer_sums_are_exact(kernel: LinearKernel, kind: str, m: int, n: int, k: int) -> None:
    x, w = random_codes(4, m, k, seed=1), random_codes(4, n, k, seed=2)
    if kind != "random":
        extreme = {"lowest": -8, "highest": 7}[kind]
        x, w = torch.full_like(x, extreme), torch.full_like(w, extreme)
    spec = make_spec(in_features=k, out_features=n, dtype=torch.float64)
    made = make_linear(spec, codes=w)
    made.stored.weight_step.fill_(1.0)
    y = run(kernel, made, x, None, bias=False)
    assert torch.equal(y.to(torch.int64), integer_products(x, w))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("weight_bits", [3, 4, 8])
@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [None, 32, 64])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_every_stored_form_equals_the_definition(
    kernel: LinearKernel,
    weight_bits: int,
    activation_bits: int,
    zero_points: bool,
    group_size: int | None,
    dynamic: bool,
) -> None:
    spec = make_spec(
        in_features=107,
        out_features=5,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        zero_points=zero_points,
        group_size=group_size,
        dynamic=dynamic,
    )
    made = make_linear(spec, bias=True)
    x = random_codes(activation_bits, 3, 107, seed=9)
    step = make_token_step(3) if dynamic else None
    for bias in (False, True):
        assert torch.equal(run(kernel, made, x, step, bias), spelled_out(made, x, step, bias))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_epilogue_is_the_references(out_dtype: torch.dtype, dynamic: bool, bias: bool) -> None:
    spec = make_spec(in_features=127, out_features=43, dtype=out_dtype, dynamic=dynamic)
    made = make_linear(spec, bias=True)
    x, step = random_codes(4, 7, 127, seed=3), make_token_step(7) if dynamic else None
    expected = spelled_out(made, x, step, bias)
    for kernel in KERNELS:
        y = run(kernel, made, x, step, bias)
        assert y.dtype == out_dtype
        assert torch.equal(y, expected)


def test_leading_dimensions_are_kept() -> None:
    made = make_linear(make_spec(in_features=16, out_features=5))
    x = random_codes(4, 2, 3, 16)
    for kernel in KERNELS:
        assert run(kernel, made, x, None, bias=False).shape == (2, 3, 5)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("weight_bits", [3, 4, 8])
def test_sums_too_long_for_float32_are_exact_all_the_same(
    weight_bits: int, zero_points: bool
) -> None:
    """All products at their largest and one that makes the sum odd: float32 would lose it."""
    longest = exact_channels(
        make_spec(weight_bits=weight_bits, activation_bits=8, zero_points=zero_points)
    )
    k = 2 * longest + 1
    spec = make_spec(
        in_features=k,
        out_features=1,
        weight_bits=weight_bits,
        activation_bits=8,
        zero_points=zero_points,
        dtype=torch.float64,
    )
    half = 2 ** (weight_bits - 1)
    w, x = torch.full((1, k), -half, dtype=torch.int8), torch.full((1, k), -128, dtype=torch.int8)
    zeros = torch.full((1, 1), half - 1, dtype=torch.int8) if zero_points else None
    w[0, -1] = half - 1 if not zero_points else -half
    x[0, -1] = 1
    made = make_linear(spec, codes=w, zero_points=zeros)
    made.stored.weight_step.fill_(1.0)
    zero = half - 1 if zero_points else 0
    exact = 128 * (half + zero) * (k - 1) + (int(w[0, -1]) - zero)
    for kernel in KERNELS:
        assert float(run(kernel, made, x, None, bias=False)) == float(torch.tensor(float(exact)))


def test_other_devices_are_refused() -> None:
    assert CpuFp32Linear().refusal(make_spec()) is None
    assert CpuFp32Linear().refusal(make_spec(device="cuda")) is not None

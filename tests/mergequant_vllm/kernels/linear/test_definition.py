"""CPU kernels against the definition in 64-bit integers: equal, to the last bit."""

import itertools

import pytest
import torch
from torch import Tensor

from mergequant_vllm.kernels.linear.cpu.fp32 import LARGEST_SUM, CpuFp32Linear
from mergequant_vllm.kernels.linear.exactness import exact_columns
from mergequant_vllm.kernels.linear.reference import ReferenceLinear, integer_products
from mergequant_vllm.kernels.linear.spec import LinearKernel, StoredLinear
from tests.mergequant_vllm.kernels.made import (
    MadeLinear,
    make_inputs,
    make_linear,
    make_spec,
    make_token_step,
    make_token_zero,
    random_codes,
    run,
)

KERNELS: list[LinearKernel] = [CpuFp32Linear(), ReferenceLinear()]
SIZES = [(1, 1, 1), (2, 7, 43), (7, 129, 127), (64, 128, 128), (128, 43, 352), (129, 64, 4099)]


def spelled_out(
    made: MadeLinear,
    x: Tensor,
    token_step: Tensor | None,
    bias: bool,
    token_zero: Tensor | None = None,
) -> Tensor:
    """The definition, output by output and span by span, in Python's integers and float32."""
    spec, stored = made.spec, made.stored
    y = torch.empty(x.shape[0], spec.out_features)
    per_channel = spec.group_size is None and spec.segments is None
    size = spec.group_size or spec.in_features
    lengths = spec.segments or [size] * spec.groups
    for t, j in itertools.product(range(x.shape[0]), range(spec.out_features)):
        total, start = torch.zeros(()), 0
        low = 0 if token_zero is None else int(token_zero[t, 0])
        for g, length in enumerate(lengths):
            part = slice(start, start + length)
            start += length
            zero = 0 if stored.zero_points is None else int(stored.zero_points[j, g])
            pairs = zip(x[t, part].tolist(), made.codes[j, part].tolist(), strict=True)
            products = torch.tensor(float(sum((a - low) * (w - zero) for a, w in pairs)))
            if token_step is not None and per_channel:
                products = products * token_step[t, 0]
            total = total + products * stored.weight_step[j, g]
        if token_step is not None and not per_channel:
            total = total * token_step[t, 0]
        constants = [stored.bias] if bias else []
        added = [float(c[j]) for c in (*constants, stored.output_offset) if c is not None]
        if added:
            total = total + torch.tensor(added).sum()
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
    x, step, _ = make_inputs(spec, 3, seed=9)
    for bias in (False, True):
        assert torch.equal(run(kernel, made, x, step, bias), spelled_out(made, x, step, bias))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("segments", [None, (107,), (64, 43), (32, 64, 11)], ids=str)
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(3, 4), (4, 4), (8, 8)])
@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("token_zero_points", [False, True], ids=["centred", "shifted"])
def test_segments_token_zero_points_and_offsets_equal_the_definition(
    kernel: LinearKernel,
    segments: tuple[int, ...] | None,
    weight_bits: int,
    activation_bits: int,
    zero_points: bool,
    token_zero_points: bool,
) -> None:
    spec = make_spec(
        in_features=107,
        out_features=5,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        zero_points=zero_points,
        segments=segments,
        dynamic=True,
        token_zero_points=token_zero_points,
        dtype=torch.bfloat16,
    )
    x, step, zero = make_inputs(spec, 3, seed=9)
    made = make_linear(spec, bias=True, offset=True)
    without_bias = make_linear(spec, offset=True)
    for linear, bias in ((made, False), (made, True), (without_bias, True)):
        wanted = spelled_out(linear, x, step, bias, zero)
        assert torch.equal(run(kernel, linear, x, step, bias, zero), wanted)


def test_the_definition_is_the_linear_of_real_numbers() -> None:
    """Against the products of dequantized values, in float64."""
    spec = make_spec(
        in_features=107,
        out_features=9,
        segments=(64, 43),
        zero_points=True,
        dynamic=True,
        token_zero_points=True,
    )
    made = make_linear(spec, bias=True, offset=True)
    stored = made.stored
    assert stored.zero_points is not None and stored.bias is not None
    assert stored.output_offset is not None
    x, step, zero = random_codes(4, 6, 107), make_token_step(6), make_token_zero(4, 6)
    segment = torch.tensor([0] * 64 + [1] * 43)
    weight = (made.codes.double() - stored.zero_points[:, segment]) * stored.weight_step[:, segment]
    real = (x.double() - zero) * step @ weight.T + stored.bias + stored.output_offset
    y = run(ReferenceLinear(), made, x, step, True, zero)
    assert torch.allclose(y.double(), real, rtol=1e-6, atol=1e-5)


def test_constants_are_added_once_in_float32() -> None:
    bias = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    offset = torch.tensor([2.0**-20, 1.0])
    packed, step = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    both = StoredLinear(packed, step, None, bias, offset)
    assert torch.equal(constant(both, True), torch.tensor([1.0 + 2.0**-20, 3.0]))
    assert torch.equal(constant(both, False), offset)
    halves = StoredLinear(packed, step, None, None, offset.to(torch.bfloat16))
    assert torch.equal(constant(halves, True), constant(halves, False))
    assert constant(halves, True).dtype == torch.float32
    assert StoredLinear(packed, step, None, bias).constant(False) is None


def constant(stored: StoredLinear, add_bias: bool) -> Tensor:
    total = stored.constant(add_bias)
    assert total is not None
    return total


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        ({"segments": (64, 288), "group_size": 32}, "in groups of 32 or in segments"),
        ({"segments": (64, 64)}, r"\(64, 64\) do not add up to 352"),
        ({"segments": (352, 0)}, "do not add up"),
        ({"segments": (48, 304)}, "48 columns is no multiple of 32"),
        ({"token_zero_points": True}, "static activations have no zero points"),
    ],
    ids=str,
)
def test_forms_that_no_checkpoint_has_are_errors(form: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        make_spec(**form)


def test_forms_are_named_as_users_read_them() -> None:
    spec = make_spec(segments=(32, 64, 256), dynamic=True, token_zero_points=True)
    assert "W4 in 3 segments, A4 per token, asymmetric, float32" in str(spec)
    assert (spec.groups, spec.longest_span) == (3, 256)
    assert spec.spans == [slice(0, 32), slice(32, 96), slice(96, 352)]
    assert make_spec().spans is None
    assert make_spec(group_size=352).spans == [slice(0, 352)]


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_epilogue_is_the_references(out_dtype: torch.dtype, dynamic: bool, bias: bool) -> None:
    spec = make_spec(in_features=127, out_features=43, dtype=out_dtype, dynamic=dynamic)
    made = make_linear(spec, bias=True)
    x, step, _ = make_inputs(spec, 7, seed=3)
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
    wide = make_spec(weight_bits=weight_bits, activation_bits=8, zero_points=zero_points)
    longest = exact_columns(wide, LARGEST_SUM)
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

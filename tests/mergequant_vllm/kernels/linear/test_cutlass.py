"""CutlassLinear's operands and roundings against the reference, on an emulated vLLM function."""

import sys
import types
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout, lay_out
from mergequant_vllm.kernels.linear.cutlass import CutlassLinear
from mergequant_vllm.kernels.linear.reference import integer_products, scale_products
from tests.mergequant_vllm.kernels.graphs import GraphKeeper
from tests.mergequant_vllm.kernels.made import (
    GPU,
    expected,
    half_ulp,
    make_inputs,
    make_linear,
    make_on_gpu,
    make_spec,
    random_codes,
    run,
)

KERNEL = CutlassLinear()

# (N, K): aligned to 16, off it by N, by K, by both.
SIZES = [(64, 128), (43, 128), (128, 127), (129, 351), (1, 1), (16, 7)]

Multiply = Callable[..., Tensor]


def multiply(*, fused: bool) -> Multiply:
    """`cutlass_scaled_mm`: its demands, and the product by the documented order of roundings."""

    def cutlass_scaled_mm(
        a: Tensor,
        b: Tensor,
        scale_a: Tensor,
        scale_b: Tensor,
        out_dtype: torch.dtype,
        bias: Tensor | None = None,
    ) -> Tensor:
        assert out_dtype in (torch.bfloat16, torch.float16)
        rows = a.view(-1, a.shape[-1])
        assert a.dtype == b.dtype == torch.int8
        assert rows.stride(1) == 1 and rows.shape[1] == b.shape[0]
        assert b.stride(0) == 1 and b.stride(1) % 16 == 0
        assert b.shape[0] % 16 == 0 and b.shape[1] % 16 == 0
        for scale, size in ((scale_a, rows.shape[0]), (scale_b, b.shape[1])):
            assert scale.dtype == torch.float32 and scale.is_contiguous()
            assert scale.numel() in (1, size) and scale.dim() == 2 and scale.shape[1] == 1
        y = integer_products(rows, b.T).float() * scale_b[:, 0]
        if bias is None:
            y = y * scale_a
        else:
            assert bias.dtype == out_dtype and bias.shape == (b.shape[1],)
            assert bias.is_contiguous()
            # A product of two float32 numbers is exact in float64.
            product = y.double() * scale_a.double()
            product = product if fused else product.float().double()
            y = (product + bias.double()).float()
        return y.to(out_dtype).view(*a.shape[:-1], b.shape[1])

    return cutlass_scaled_mm


def install(patch: pytest.MonkeyPatch, *, fused: bool = True) -> None:
    """A vLLM that consists of this function."""
    package, operations = types.ModuleType("vllm"), types.ModuleType("vllm._custom_ops")
    operations.cutlass_scaled_mm = multiply(fused=fused)  # type: ignore[attr-defined]
    package._custom_ops = operations  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "vllm", package)
    patch.setitem(sys.modules, "vllm._custom_ops", operations)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129])
def test_static_linears_equal_the_reference(
    tokens: int, size: tuple[int, int], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    made = make_on_gpu(*size, weight_bits=bits)
    x = random_codes(4, tokens, size[1], seed=tokens)
    assert torch.equal(run(KERNEL, made, x, None), expected(made, x, None))


@pytest.mark.parametrize("fused", [False, True], ids=["two roundings", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_so_they_do_with_a_bias(
    bits: int, dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, fused=fused)
    made = make_on_gpu(43, 127, bias=True, dtype=dtype, activation_bits=bits)
    x = random_codes(bits, 129, 127, seed=1)
    assert torch.equal(run(KERNEL, made, x, None, bias=True), expected(made, x, None, bias=True))
    assert torch.equal(run(KERNEL, made, x, None), expected(made, x, None))


@pytest.mark.parametrize("bias", [False, True])
def test_the_constant_is_rounded_to_the_models_dtype(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    made = make_on_gpu(43, 127)
    made = make_linear(made.spec, codes=made.codes, bias=bias, offset=True)
    x = random_codes(4, 9, 127, seed=1)
    for add_bias in (False, True):
        constant = made.stored.constant(add_bias)
        assert constant is not None
        stored = replace(made.stored, bias=None, output_offset=constant.to(torch.bfloat16))
        wanted = expected(replace(made, stored=stored), x, None)
        assert torch.equal(run(KERNEL, made, x, None, add_bias), wanted)


@pytest.mark.parametrize("fused", [False, True], ids=["two roundings", "fused"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 127, 128, 129])
def test_token_steps_keep_the_bound(
    tokens: int, dtype: torch.dtype, bias: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module's bound before the cast; then each side is rounded to the output's dtype."""
    install(monkeypatch, fused=fused)
    made = make_on_gpu(129, 351, bias=bias, dtype=dtype, dynamic=True)
    x, step, _ = make_inputs(made.spec, tokens, seed=1)
    result, want = run(KERNEL, made, x, step, bias).double(), expected(made, x, step, bias).double()

    sums, weight_step = integer_products(x, made.codes), made.stored.weight_step[:, 0]
    before = scale_products(sums, weight_step, step, None, torch.float64)
    after = before if made.stored.bias is None else before + made.stored.bias.double()
    apart = 2.0**-22 * before.abs() + (2.0**-23 * after.abs() if bias else 0)
    apart *= 1 + 2.0**-10  # the bound is to first order
    allowed = apart + 2 * half_ulp(dtype, after.abs() + apart)
    assert ((result - want).abs() <= allowed).all()


@pytest.mark.parametrize("pair", [(-8, -8), (7, 7), (127, -128), (-128, -128)], ids=str)
def test_extreme_codes(pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    spec = make_spec(in_features=351, out_features=43, weight_bits=8, activation_bits=8, **GPU)
    made = make_linear(spec, codes=torch.full((43, 351), pair[1], dtype=torch.int8))
    x = torch.full((3, 351), pair[0], dtype=torch.int8)
    assert torch.equal(run(KERNEL, made, x, None), expected(made, x, None))


def test_leading_dimensions_and_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes [2, 3, K] and steps [2, 3, 1], both cut out of wider tensors; steps powers of two."""
    install(monkeypatch)
    made = make_on_gpu(43, 127, dynamic=True)
    prepared = KERNEL.prepare(made.stored, made.spec)
    x = random_codes(4, 2, 3, 127)
    codes = lay_out(x, CodeLayout.INT8, prepared.columns + 7)[..., : prepared.columns]
    step = (2.0 ** -torch.arange(24.0)).reshape(2, 3, 4)[..., :1]
    assert torch.equal(prepared(codes, step, None, False), expected(made, x, step))


def test_all_padding_is_code_0(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    made = make_on_gpu(43, 127)
    prepared = KERNEL.prepare(made.stored, made.spec)
    padded = torch.zeros(48, 128, dtype=torch.int8)
    padded[:43, :127] = made.codes
    assert prepared.columns == 128
    assert torch.equal(prepared.get_buffer("weight"), padded)


def test_one_graph_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's function is traced, as in vLLM's own layers; here the operation below it is opaque."""
    install(monkeypatch)
    operation = sys.modules["vllm._custom_ops"].cutlass_scaled_mm
    wrapped = torch.compiler.allow_in_graph(operation)  # type: ignore[no-untyped-call]
    monkeypatch.setattr(sys.modules["vllm._custom_ops"], "cutlass_scaled_mm", wrapped)
    made = make_on_gpu(48, 128)
    prepared = KERNEL.prepare(made.stored, made.spec)
    keeper = GraphKeeper()
    compiled = torch.compile(prepared, fullgraph=True, dynamic=True, backend=keeper)
    for tokens in (2, 5, 65):
        x = random_codes(4, tokens, 128)
        assert torch.equal(compiled(x, None, None, False), expected(made, x, None))
    assert len(keeper.graphs) == 1

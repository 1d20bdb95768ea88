"""Marlin's layout, arguments and roundings against the reference, on emulated vLLM functions."""

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout, lay_out
from mergequant_vllm.kernels.linear import marlin
from mergequant_vllm.kernels.linear.marlin import MarlinLinear, marlin_int8, marlin_words
from mergequant_vllm.kernels.linear.reference import integer_products, scale_products
from mergequant_vllm.packing import pack
from tests.mergequant_vllm.kernels.graphs import GraphKeeper
from tests.mergequant_vllm.kernels.linear import emulated_marlin
from tests.mergequant_vllm.kernels.made import (
    GPU,
    expected,
    half_ulp,
    make_inputs,
    make_linear,
    make_on_gpu,
    make_spec,
    make_token_step,
    random_codes,
    run,
)

pytest.importorskip("vllm", reason="vLLM is not installed")

KERNEL = MarlinLinear()
VERSIONS = ["0.26", "0.32"]

# (N, K): on both families of tiles, off them by N, by K, by both; K ends inside a word in some.
SIZES = [(64, 128), (128, 64), (43, 127), (129, 352), (192, 7), (1, 1), (320, 8)]


def gamma(roundings: int) -> float:
    """Relative error of that many roundings to float32 in a row."""
    return roundings * 2.0**-24 / (1 - roundings * 2.0**-24)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129])
def test_sizes(
    tokens: int, size: tuple[int, int], dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated_marlin.install(monkeypatch)
    made = make_on_gpu(*size, dynamic=dynamic)
    x, step, _ = make_inputs(made.spec, tokens, seed=tokens)
    assert torch.equal(run(KERNEL, made, x, step), expected(made, x, step))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bias_rounds_twice(
    dtype: torch.dtype, dynamic: bool, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly as documented, and as near to the reference as two roundings can be to one."""
    emulated_marlin.install(monkeypatch, version)
    made = make_on_gpu(43, 127, bias=True, dtype=dtype, dynamic=dynamic)
    x, step, _ = make_inputs(made.spec, 129, seed=1)
    assert torch.equal(run(KERNEL, made, x, step), expected(made, x, step))

    y, bias = run(KERNEL, made, x, step, bias=True), made.stored.bias
    assert bias is not None and torch.equal(y, expected(made, x, step) + bias)
    sums = integer_products(x, made.codes)
    before = scale_products(sums, made.stored.weight_step[:, 0], step, None, torch.float64)
    # The kernel's two roundings, then the reference's to the output's dtype; both add in float32.
    allowed = half_ulp(dtype, before) + half_ulp(dtype, before.to(dtype).double() + bias.double())
    biased = before + bias.double()
    allowed += 2 * half_ulp(torch.float32, biased) + half_ulp(dtype, biased.float().double())
    difference = (y.double() - expected(made, x, step, bias=True).double()).abs()
    assert (difference <= allowed).all()


@pytest.mark.parametrize("bias", [False, True])
def test_the_constant_is_rounded_to_the_models_dtype(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated_marlin.install(monkeypatch)
    made = make_on_gpu(43, 127)
    made = make_linear(made.spec, codes=made.codes, bias=bias, offset=True)
    bare = replace(made, stored=replace(made.stored, bias=None, output_offset=None))
    x = random_codes(4, 9, 127, seed=1)
    for add_bias in (False, True):
        constant = made.stored.constant(add_bias)
        assert constant is not None
        wanted = expected(bare, x, None) + constant.to(torch.bfloat16)
        assert torch.equal(run(KERNEL, made, x, None, add_bias), wanted)


@pytest.mark.parametrize("bits", [4, 8])
def test_shared_channels_of_static_linears(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit up to sums of 2^16 in magnitude, however warps and thread blocks share K."""
    emulated_marlin.install(monkeypatch, shares=emulated_marlin.shared)
    k = 2 ** (18 - bits - 4)  # 2^16 / (2^(bits - 1) * 2^3)
    made = make_on_gpu(43, k, activation_bits=bits)
    x = random_codes(bits, 129, k, seed=1)
    x[0], made.codes[0] = -(2 ** (bits - 1)), -8
    made = make_linear(made.spec, codes=made.codes)
    assert integer_products(x, made.codes)[0, 0] == 2**16
    assert torch.equal(run(KERNEL, made, x, None), expected(made, x, None))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shared_channels_keep_the_bound(
    dtype: torch.dtype, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated_marlin.install(monkeypatch, shares=emulated_marlin.shared)
    made = make_on_gpu(64, 2048, activation_bits=8, dynamic=dynamic, dtype=dtype)
    x, step, _ = make_inputs(made.spec, 129, seed=1)
    magnitudes = integer_products(x.to(torch.int16).abs(), made.codes.abs()).double()
    magnitudes *= made.stored.weight_step[:, 0].double() * (1 if step is None else step.double())
    blocks = len(emulated_marlin.shared(2048))
    before = magnitudes * (gamma(blocks + 3) + gamma(3))
    want = expected(made, x, step).double()
    # Both are rounded to the output's dtype, the reference from a value within half an ulp of it.
    near = want.abs() * (1 + 2 * torch.finfo(dtype).eps) + before
    allowed = before + 2 * half_ulp(dtype, near)
    assert ((run(KERNEL, made, x, step).double() - want).abs() <= allowed).all()


@pytest.mark.parametrize("pair", [(-8, -8), (7, 7), (-8, 7), (127, -8), (-128, -8)], ids=str)
def test_extreme_codes(pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_marlin.install(monkeypatch)
    spec = make_spec(in_features=351, out_features=43, activation_bits=8, **GPU)
    made = make_linear(spec, codes=torch.full((43, 351), pair[1], dtype=torch.int8))
    x = torch.full((3, 351), pair[0], dtype=torch.int8)
    assert torch.equal(run(KERNEL, made, x, None), expected(made, x, None))


def test_leading_dimensions_and_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes [2, 3, K] and steps [2, 3, 1], both cut out of wider tensors."""
    emulated_marlin.install(monkeypatch)
    made = make_on_gpu(43, 127, dynamic=True)
    prepared = KERNEL.prepare(made.stored, made.spec)
    x = random_codes(4, 2, 3, 127)
    codes = lay_out(x, CodeLayout.INT8, prepared.columns + 7)[..., : prepared.columns]
    step = make_token_step(24).reshape(2, 3, 4)[..., :1]
    assert torch.equal(prepared(codes, step, None, False), expected(made, x, step))


@pytest.mark.parametrize("tokens", [3, 4, 5, 129])
def test_more_tokens_than_ones(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulation asserts one activation scale a token; the kernel would read beyond them."""
    emulated_marlin.install(monkeypatch)
    monkeypatch.setattr(marlin, "ROWS_OF_ONES", 4)
    made = make_on_gpu(64, 128)
    x = random_codes(4, tokens, 128)
    assert torch.equal(run(KERNEL, made, x, None), expected(made, x, None))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_padding_is_code_0(size: tuple[int, int]) -> None:
    n, k = size
    codes = random_codes(4, n, k)
    words = marlin_words(pack(codes, 4), k, 384, 384)
    assert words.shape == (48, 384) and words.is_contiguous()
    padded = torch.zeros(384, 384, dtype=torch.int8)
    padded[:n, :k] = codes
    unpacked = emulated_marlin.nibbles(words).transpose(1, 2).reshape(384, 384) - 8
    assert torch.equal(unpacked.T, padded)


@pytest.mark.parametrize("size", [(64, 128), (128, 64), (192, 384)], ids=str)
def test_the_two_statements_of_the_layout_agree(size: tuple[int, int]) -> None:
    """What vLLM's model packs and permutes, the fragments of the matrix instruction read."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    n, k = size
    codes = random_codes(4, n, k)
    repack = emulated_marlin.functions("0.32")["gptq_marlin_repack"]
    packed = repack(marlin_words(pack(codes, 4), k, n, k), k, n, 4, True)
    assert torch.equal(emulated_marlin.read_weight(packed, k, n), codes)
    values = torch.arange(float(n))
    steps = marlin_utils.marlin_permute_scales(values[None], k, n, -1, is_a_8bit=True)
    for permuted in (steps[0], marlin_utils.marlin_permute_bias(values)):
        assert not torch.equal(permuted, values)
        assert torch.equal(emulated_marlin.read_columns(permuted), values)


def test_installed_vllm_has_known_arguments() -> None:
    """The emulations take the arguments of vLLM 0.26.0 and of 0.32.0 and 0.33.0."""
    from vllm import _custom_ops

    def arguments(function: Callable[..., Tensor]) -> list[tuple[str, object]]:
        return [(x.name, x.default) for x in inspect.signature(function).parameters.values()]

    known = [emulated_marlin.functions(version) for version in VERSIONS]
    for name in ("marlin_gemm", "gptq_marlin_repack"):
        installed = arguments(getattr(_custom_ops, name))
        assert installed in [arguments(functions[name]) for functions in known]


def operator_arguments(tokens: int, *, optional: bool = True) -> tuple[object, ...]:
    made = make_on_gpu(43, 127, bias=True)
    prepared = KERNEL.prepare(made.stored, made.spec)
    codes = lay_out(random_codes(4, tokens, 127), CodeLayout.INT8, prepared.columns)
    step, bias = (
        (make_token_step(tokens), prepared.constant_with_bias) if optional else (None, None)
    )
    weights = (prepared.weight, prepared.weight_step)
    return codes, *weights, step, prepared.ones, bias, prepared.workspace, 43


def test_operator_is_registered_soundly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake implementation and dynamic shapes, by PyTorch's own check."""
    emulated_marlin.install(monkeypatch)
    for optional in (True, False):
        torch.library.opcheck(marlin_int8, operator_arguments(5, optional=optional))


def test_one_graph_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full-graph compile sees one opaque operator, whatever the number of tokens."""
    emulated_marlin.install(monkeypatch)
    monkeypatch.setattr(marlin, "ROWS_OF_ONES", 8)
    made = make_on_gpu(43, 127)
    prepared = KERNEL.prepare(made.stored, made.spec)
    keeper = GraphKeeper()
    compiled = torch.compile(prepared, fullgraph=True, dynamic=True, backend=keeper)
    for tokens in (2, 5, 65):
        x = random_codes(4, tokens, 127)
        codes = lay_out(x, CodeLayout.INT8, prepared.columns)
        assert torch.equal(compiled(codes, None, None, False), expected(made, x, None))
    assert len(keeper.graphs) == 1
    assert keeper.calls() == ["mergequant.marlin_int8.default"]

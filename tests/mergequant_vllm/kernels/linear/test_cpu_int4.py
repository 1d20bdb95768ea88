"""The native INT4 linear equals the definition, to the last bit, in every instruction set."""

import contextlib
import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergequant_vllm.kernels import native_library as native
from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.linear.cpu.fp32 import CpuFp32Linear
from mergequant_vllm.kernels.linear.cpu.int4 import (
    CpuInt4Linear,
    integer_linear,
    integer_linear_cpu,
    pack_weight,
    token_linear,
    token_linear_cpu,
)
from mergequant_vllm.kernels.linear.reference import ReferenceLinear, integer_products
from mergequant_vllm.kernels.token_quant.cpu import token_quant, token_quant_native
from tests.mergequant_vllm.kernels.made import (
    MadeLinear,
    expected,
    make_inputs,
    make_linear,
    make_spec,
    make_token_step,
    random_codes,
    run,
)

KERNEL = CpuInt4Linear()
TOKENS = [1, 2, 3, 5, 7, 8, 9, 64, 127, 128, 129]
# Odd and prime, around the vectors' lengths, and beyond what 16-bit sums hold.
SIZES = [(1, 1), (43, 31), (7, 63), (5, 64), (129, 65), (64, 127), (3, 128), (13, 4353), (11, 8705)]
pytestmark = pytest.mark.usefixtures("isa")


def unscaled(made: MadeLinear) -> MadeLinear:
    """The same codes with steps of 1: the output is the integer sum, rounded to float32."""
    step = torch.ones_like(made.stored.weight_step)
    return replace(made, stored=replace(made.stored, weight_step=step))


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_sums_are_exact(n: int, k: int) -> None:
    made = unscaled(make_linear(make_spec(in_features=k, out_features=n), seed=n))
    prepared = KERNEL.prepare(made.stored, made.spec)
    for tokens in TOKENS:
        x = random_codes(4, tokens, k, seed=tokens)
        sums = integer_products(x, made.codes)
        assert int(sums.abs().max()) < 2**24  # float32 holds them
        assert torch.equal(prepared(x, None, None, False).to(torch.int64), sums)


@pytest.mark.parametrize("k", [4095, 4096, 4352, 4353, 8704, 32768, 65536])
@pytest.mark.parametrize("codes", [(-8, -8), (7, -8), (-8, 7), (7, 7)])
def test_the_largest_sums_do_not_overflow(codes: tuple[int, int], k: int) -> None:
    weight, activation = codes
    w, x = torch.full((5, k), weight, dtype=torch.int8), torch.full((9, k), activation)
    made = unscaled(make_linear(make_spec(in_features=k, out_features=5), codes=w))
    for tokens in (1, 9):
        y = run(KERNEL, made, x[:tokens].to(torch.int8), None)
        assert torch.equal(y, torch.full((tokens, 5), float(weight * activation * k)))


@pytest.mark.parametrize("weight_bits", [3, 4, 8])
@pytest.mark.parametrize("activation", [-128, 127])
@pytest.mark.parametrize("k", [255, 256, 257, 32768, 65536, 131071])
def test_the_largest_sums_of_8_bit_activations_do_not_overflow(
    weight_bits: int, activation: int, k: int
) -> None:
    """131071 * 128 * 128 < 2^31; bytes without a sign add up to twice as much, modulo 2^32."""
    half = 2 ** (weight_bits - 1)
    for weight in (-half, half - 1):
        w = torch.full((3, k), weight, dtype=torch.int8)
        spec = make_spec(in_features=k, out_features=3, weight_bits=weight_bits, activation_bits=8)
        made = unscaled(make_linear(spec, codes=w))
        for tokens in (1, 11):
            x = torch.full((tokens, k), activation, dtype=torch.int8)
            exact = torch.tensor(weight * activation * k).to(torch.float32)
            assert torch.equal(run(KERNEL, made, x, None), exact.expand(tokens, 3))


@pytest.mark.parametrize("weight_bits", [3, 4, 8])
@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("group_size", "k"), [(None, 107), (None, 4500), (32, 107), (64, 352), (96, 352), (4352, 4500)]
)
def test_every_stored_form_equals_the_definition(
    weight_bits: int, activation_bits: int, zero_points: bool, group_size: int | None, k: int
) -> None:
    spec = make_spec(
        in_features=k,
        out_features=43,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        zero_points=zero_points,
        group_size=group_size,
    )
    made = make_linear(spec, bias=True)
    prepared, slow = KERNEL.prepare(made.stored, spec), ReferenceLinear().prepare(made.stored, spec)
    for tokens in (1, 6, 33):
        x, step = random_codes(activation_bits, tokens, k, seed=tokens), make_token_step(tokens)
        for given, bias in ((None, False), (None, True), (step, False), (step, True)):
            assert torch.equal(prepared(x, given, None, bias), slow(x, given, None, bias))


@pytest.mark.parametrize("weight_bits", [3, 4, 8])
@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("token_zero_points", [False, True], ids=["centred", "shifted"])
def test_segments_token_zero_points_and_offsets_equal_the_definition(
    weight_bits: int, activation_bits: int, zero_points: bool, token_zero_points: bool
) -> None:
    """Segments of one vector and of many, the last one short."""
    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float16])
    lengths: list[tuple[int, ...] | None]
    lengths = [None, (107,), (64, 43), (32, 256, 64, 1), (1120, 32, 1088, 101), (2240, 101)]
    for segments, group_size in [*((x, None) for x in lengths), (None, 32), (None, 96)]:
        spec = make_spec(
            in_features=sum(segments or (107,)),
            out_features=43,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            zero_points=zero_points,
            segments=segments,
            group_size=group_size,
            dynamic=True,
            token_zero_points=token_zero_points,
            dtype=next(dtypes),
        )
        made = make_linear(spec, bias=True, offset=True)
        prepared, slow = (
            KERNEL.prepare(made.stored, spec),
            CpuFp32Linear().prepare(made.stored, spec),
        )
        for tokens in (1, 3, 17, 65):
            x, step, zero = make_inputs(spec, tokens, seed=tokens)
            for bias in (False, True):
                y = prepared(x, step, zero, bias)
                assert torch.equal(y, slow(x.to(torch.float32), step, zero, bias))


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("segments", [None, (16416, 96, 33), (8192, 8192, 161)])
def test_more_channels_than_one_run_has(weight_bits: int, segments: tuple[int, ...] | None) -> None:
    """Sums are kept from one run of channels to the next, for several blocks of outputs."""
    spec = make_spec(
        in_features=sum(segments or (16545,)),
        out_features=70,
        weight_bits=weight_bits,
        segments=segments,
        dynamic=True,
    )
    made = make_linear(spec, bias=True)
    prepared, slow = KERNEL.prepare(made.stored, spec), CpuFp32Linear().prepare(made.stored, spec)
    for tokens in (13, 33, 50):
        x, step, zero = make_inputs(spec, tokens, seed=tokens)
        assert torch.equal(prepared(x, step, zero, True), slow(x.float(), step, zero, True))


@pytest.mark.parametrize("segments", [None, (32768, 33)])
def test_the_largest_sums_of_both_zero_points_do_not_overflow(
    segments: tuple[int, ...] | None,
) -> None:
    """255 * 255 * 32801 < 2^31: every code and every zero point at an end of its range."""
    k = 32801
    spec = make_spec(
        in_features=k,
        out_features=3,
        weight_bits=8,
        activation_bits=8,
        zero_points=True,
        segments=segments,
        dynamic=True,
        token_zero_points=True,
    )
    assert KERNEL.refusal(spec) is None
    for weight, activation in ((-128, -128), (-128, 127), (127, -128), (127, 127)):
        codes = torch.full((3, k), weight, dtype=torch.int8)
        zeros = torch.full((3, spec.groups), -1 - weight, dtype=torch.int8)
        made = unscaled(make_linear(spec, codes=codes, zero_points=zeros))
        for tokens in (1, 13):
            x = torch.full((tokens, k), activation, dtype=torch.int8)
            zero, step = torch.full((tokens, 1), -1 - activation), torch.ones(tokens, 1)
            product = (2 * weight + 1) * (2 * activation + 1)
            parts = [float(torch.tensor(float(product * n))) for n in segments or (k,)]
            exact = torch.tensor(parts, dtype=torch.float32).sum()
            y = run(KERNEL, made, x, step, zero=zero.to(torch.int32))
            assert torch.equal(y, exact.expand(tokens, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1.0, 1e30, 3e38])
def test_steps_of_any_size_are_multiplied_as_the_definition_does(
    dtype: torch.dtype, scale: float
) -> None:
    """Subnormal and infinite results, and halves of the output's last bit."""
    for group_size in (None, 64):
        spec = make_spec(in_features=352, dtype=dtype, group_size=group_size)
        made = make_linear(spec, bias=True)
        x, step = random_codes(4, 40, 352), make_token_step(40) * scale
        assert torch.equal(run(KERNEL, made, x, step, True), expected(made, x, step, True))


def test_rows_may_be_apart_and_longer_than_the_layer() -> None:
    made = make_linear(make_spec(in_features=100, out_features=9))
    wide = random_codes(4, 2, 3, 160)
    prepared = KERNEL.prepare(made.stored, made.spec)
    for x in (wide[..., 7:107], wide[..., :100], wide[:, :1, 20:120]):
        assert torch.equal(prepared(x, None, None, False), expected(made, x, None))
    assert prepared(wide[:0, ..., :100], None, None, False).shape == (0, 3, 9)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_number_of_threads_changes_nothing(bits: int) -> None:
    widths = {"weight_bits": bits, "activation_bits": bits}
    made = make_linear(make_spec(in_features=1030, out_features=770, group_size=128, **widths))
    x, step, before = random_codes(bits, 600, 1030), make_token_step(600), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(KERNEL, made, x, step))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("weight_bits", [3, 4, 8])
def test_weights_stay_packed(weight_bits: int) -> None:
    made = make_linear(make_spec(in_features=512, out_features=64, weight_bits=weight_bits))
    prepared = KERNEL.prepare(made.stored, made.spec)
    tensors = dict(prepared.named_buffers())
    width = 8 if weight_bits == 8 else 4
    assert tensors["weight"].nbytes == 512 * 64 * width // 8
    assert sum(x.nbytes for x in tensors.values()) == tensors["weight"].nbytes + 4 * 64


def test_the_operator_is_traced_by_the_compiler() -> None:
    made = make_linear(make_spec(in_features=352, out_features=128, dynamic=True), bias=True)
    prepared = KERNEL.prepare(made.stored, made.spec)
    x, step, _ = make_inputs(made.spec, 6)
    arguments: tuple[object, ...] = (
        x, prepared.weight, prepared.weight_step, None, None, None, step, None,
        prepared.constant_with_bias, 352, 4, 4, torch.float32,
    )  # fmt: skip
    torch.library.opcheck(integer_linear_cpu, arguments)


def test_what_it_cannot_do_is_refused() -> None:
    assert KERNEL.refusal(make_spec()) is None
    assert KERNEL.layout is CodeLayout.INT8
    refusals: dict[str, dict[str, object]] = {
        "runs on the CPU": {"device": "cuda"},
        "not float64": {"dtype": torch.float64},
        "exact up to 17895697 channels": {"in_features": 17895698},
        "exact up to 33025 channels and the layer adds 33026": {
            "segments": (32, 33026),
            "in_features": 33058,
            "weight_bits": 8,
            "activation_bits": 8,
            "zero_points": True,
            "dynamic": True,
            "token_zero_points": True,
        },
    }
    for reason, changes in refusals.items():
        assert reason in str(KERNEL.refusal(make_spec(**changes)))


def test_wrong_arguments_are_errors_and_not_crashes() -> None:
    weight = torch.zeros(1 << 16, dtype=torch.uint8)
    steps = torch.ones(4, 1)

    codes = torch.zeros(2, 64, dtype=torch.int8)
    zero = torch.zeros(2, 1, dtype=torch.int32)

    def attempt(
        k: int, bits: int = 4, ends: tuple[int, ...] | None = None, zero: Tensor | None = None
    ) -> None:
        spans = len(ends or (0,))
        there = None if ends is None else torch.tensor(ends, dtype=torch.int32)
        tensors = (codes, weight, steps.expand(4, spans).contiguous(), None, None, there)
        integer_linear_cpu(*tensors, None, zero, None, k, bits, 4, torch.float32)

    attempt(64)
    attempt(64, 4, (32, 64))
    wrong: list[tuple[Any, ...]] = [(65,), (0,), (64, 5), (64, 4, None, zero)]
    wrong += [
        (64, 4, ends) for ends in ((33, 64), (32, 32, 64), (64, 32), (32,), (32, 96), (-32, 64))
    ]
    for arguments in wrong:
        with pytest.raises(RuntimeError, match="out of range"):
            attempt(*arguments)


@pytest.mark.skipif(native.refusal() is not None, reason=str(native.refusal()))
class TestOperatorsWithoutPython:
    """The library's own operators against the Python functions that define them, bit for bit."""

    @pytest.fixture(autouse=True)
    def registered(self) -> None:
        assert native.register_operators()

    @staticmethod
    def linear(bits: int, zero_points: bool = False) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(bits)
        codes = torch.randint(-8, 8, (48, 96), dtype=torch.int8, generator=generator)
        sums = codes.sum(1, keepdim=True, dtype=torch.int32)
        step = torch.rand(48, 1, generator=generator)
        zeros = torch.zeros(48, 1, dtype=torch.int8) if zero_points else None
        return (pack_weight(codes, bits), step, zeros, sums, None)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(1, 96), (5, 96), (2, 3, 96), (0, 96), (96,)])
    def test_a_product(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        codes = torch.randint(-8, 8, shape, dtype=torch.int8)
        step = torch.rand(*shape[:-1], 1)
        zero = torch.randint(-8, 8, (*shape[:-1], 1), dtype=torch.int32)
        constant = torch.randn(48)
        for given in ((None, None, None), (step, zero, constant)):
            arguments = (codes, *self.linear(4, zero_points=True), *given, 96, 4, 4, dtype)
            assert torch.equal(integer_linear_cpu(*arguments), integer_linear(*arguments))

    @pytest.mark.parametrize("zero_points", [False, True])
    @pytest.mark.parametrize("block", [0, 32])
    @pytest.mark.parametrize("shape", [(1, 96), (4, 3, 96), (0, 96)])
    def test_tokens(self, zero_points: bool, block: int, shape: tuple[int, ...]) -> None:
        x, clip = torch.randn(shape, dtype=torch.bfloat16), torch.tensor([0.9])
        arguments = (x, clip, 8, block, 96, zero_points)
        results = (token_quant_native(*arguments), token_quant(*arguments))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
        whole = (x, clip, block, zero_points, *self.linear(8), None, 96, 96, 8, 8, torch.float32)
        assert torch.equal(token_linear_cpu(*whole), token_linear(*whole))

    @pytest.mark.parametrize("case", ["turned", "sliced", "every other"])
    def test_rows_that_are_not_evenly_apart(self, case: str) -> None:
        whole = torch.randint(-8, 8, (4, 6, 192), dtype=torch.int8)
        codes = {
            "turned": whole.transpose(0, 1)[..., :96],
            "sliced": whole[:, 1:4, 96:],
            "every other": whole[..., ::2],
        }[case]
        arguments = (codes, *self.linear(4), None, None, None, 96, 4, 4, torch.float32)
        assert torch.equal(integer_linear_cpu(*arguments), integer_linear(*arguments))

    def test_a_refusal_is_an_exception(self) -> None:
        codes = torch.zeros(1, 96, dtype=torch.int8)
        arguments = (codes, *self.linear(4), None, None, None, 96, 4, 5, torch.float32)
        with pytest.raises(RuntimeError, match="mq_linear: an argument is out of range"):
            integer_linear_cpu(*arguments)

    def test_steps_need_not_be_contiguous(self) -> None:
        codes = torch.randint(-8, 8, (6, 96), dtype=torch.int8)
        steps = (torch.rand(6, 2)[:, :1], torch.rand(1, 1).expand(6, 1))
        for step in steps:
            arguments = (codes, *self.linear(4), step, None, None, 96, 4, 4, torch.float32)
            assert torch.equal(integer_linear_cpu(*arguments), integer_linear(*arguments))

    def test_an_input_without_a_dimension_is_refused(self) -> None:
        codes = torch.zeros((), dtype=torch.int8)
        arguments = (codes, *self.linear(4), None, None, None, 96, 4, 4, torch.float32)
        with pytest.raises(RuntimeError, match="an input has no dimension"):
            integer_linear_cpu(*arguments)

    @pytest.mark.parametrize("case", ["product", "tokens", "refused"])
    def test_nothing_is_lost_by_many_calls(self, case: str) -> None:
        """Tensors on the dispatcher's stack are the operator's own to give back."""
        codes = torch.zeros(64, 96, dtype=torch.int8)
        x, clip, step = torch.zeros(16, 96), torch.ones(1), torch.ones(64, 1)
        linear = self.linear(4)

        def call() -> None:  # each argument of its own, some 6 KB
            if case == "tokens":
                form = (None, 96, 96, 4, 4, torch.float32)
                token_linear_cpu(x.clone(), clip.clone(), 0, False, *linear, *form)
                return
            bits = 5 if case == "refused" else 4
            given = (codes.clone(), *linear, step.clone(), None, torch.zeros(1500))
            with contextlib.suppress(RuntimeError):
                integer_linear_cpu(*given, 96, 4, bits, torch.float32)

        def resident() -> int:
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

        for _ in range(1000):
            call()
        before = resident()
        for _ in range(10_000):
            call()
        assert resident() - before < 8 * 2**20

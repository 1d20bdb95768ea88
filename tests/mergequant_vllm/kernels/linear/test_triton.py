"""The Triton kernel equals the reference: on a GPU where there is one, else interpreted.

The program calls no function of Triton's own that is jitted, so it can be interpreted in a process
that imported Triton before TRITON_INTERPRET was set; no subprocess is needed.
"""

import itertools
import sys
import types
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout, lay_out
from mergequant_vllm.kernels.linear.exactness import INT32, exact_columns
from mergequant_vllm.kernels.linear.spec import LinearSpec, StoredLinear
from mergequant_vllm.kernels.linear.triton import operator as triton_operator
from mergequant_vllm.kernels.linear.triton.kernel import SHIFTED, TritonLinear
from mergequant_vllm.kernels.linear.triton.layout import choose_layout, to_kernel_layout
from mergequant_vllm.kernels.linear.triton.operator import integer_linear_triton
from mergequant_vllm.kernels.linear.triton.tiles import LinearShape, Tile, fit_to_layout
from tests.mergequant_vllm.kernels.graphs import GraphKeeper
from tests.mergequant_vllm.kernels.made import (
    MadeLinear,
    expected,
    make_inputs,
    make_linear,
    make_spec,
    make_token_step,
    make_token_zero,
    random_codes,
)
from tests.mergequant_vllm.kernels.programs import forget_programs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = TritonLinear()
TILES = [Tile(16, 32, 256, 2, 3), Tile(32, 64, 128, 4, 3), Tile(128, 128, 128, 8, 3)]

# (N, K): 1, primes, around the tiles.
SIZES = [(1, 1), (7, 43), (43, 7), (129, 127), (127, 129), (172, 352)]


@pytest.fixture
def kernel_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without a GPU, the program is loaded for the interpreter and forgotten after the test."""
    if DEVICE == "cpu":
        pytest.importorskip("triton", reason="Triton is not installed")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    forget_programs()
    yield
    forget_programs()


def on_device(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(DEVICE)


def run(
    made: MadeLinear, x: Tensor, token_step: Tensor | None, bias: bool, zero: Tensor | None
) -> Tensor:
    """The kernel's output for codes `x` int8 [..., K], on the CPU."""
    stored = StoredLinear(
        made.stored.weight_packed.to(DEVICE),
        made.stored.weight_step.to(DEVICE),
        on_device(made.stored.zero_points),
        on_device(made.stored.bias),
        on_device(made.stored.output_offset),
    )
    prepared = KERNEL.prepare(stored, made.spec).to(DEVICE)
    codes = lay_out(x, KERNEL.layout, prepared.columns).to(DEVICE)
    y: Tensor = prepared(codes, on_device(token_step), on_device(zero), bias)
    return y.cpu()


def assert_equals_reference(
    made: MadeLinear,
    x: Tensor,
    token_step: Tensor | None = None,
    bias: bool = False,
    zero: Tensor | None = None,
) -> Tensor:
    y, wanted = run(made, x, token_step, bias, zero), expected(made, x, token_step, bias, zero)
    assert y.dtype == made.spec.dtype
    assert torch.equal(y, wanted) and torch.equal(y.signbit(), wanted.signbit())
    return y


@pytest.mark.usefixtures("kernel_runs")
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 64, 127, 128, 129])
def test_sizes(tokens: int, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        triton_operator, "tile_for", lambda shape, *_: fit_to_layout(tile, shape.layout)
    )
    for n, k in SIZES[tokens % 3 :: 3]:  # each tile meets each size, with some number of tokens
        spec = make_spec(in_features=k, out_features=n, dynamic=True)
        made = make_linear(spec, bias=True, seed=tokens)
        x, step, _ = make_inputs(spec, tokens, seed=tokens)
        assert_equals_reference(made, x, step, bias=True)


@pytest.mark.usefixtures("kernel_runs")
@pytest.mark.parametrize("weight_bits", [3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 32, 96, 128, 512])
@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "asymmetric"])
def test_every_stored_form(weight_bits: int, group_size: int | None, zero_points: bool) -> None:
    """Static and dynamic, 4-bit and 8-bit activations; the last group is short."""
    for activation_bits, dynamic in ((4, True), (8, False)):
        spec = make_spec(
            in_features=544,
            out_features=33,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            group_size=group_size,
            zero_points=zero_points,
            dynamic=dynamic,
        )
        made = make_linear(spec, bias=True)
        x, step, _ = make_inputs(spec, 3, seed=7)
        assert_equals_reference(made, x, step, bias=True)


@pytest.mark.usefixtures("kernel_runs")
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(3, 4), (4, 8), (4, 4), (8, 8)])
@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("token_zero_points", [False, True], ids=["centred", "shifted"])
def test_segments_token_zero_points_and_offsets(
    weight_bits: int, activation_bits: int, zero_points: bool, token_zero_points: bool
) -> None:
    """Segments of one group and of many, the last one short."""
    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float16])
    forms: list[tuple[tuple[int, ...] | None, int | None]] = [(None, None), (None, 64)]
    forms += [((107,), None), ((64, 43), None), ((96, 288, 32, 1), None), ((512, 256, 43), None)]
    for (segments, group_size), tokens in zip(forms, (1, 3, 17, 65, 3, 1), strict=True):
        spec = make_spec(
            in_features=sum(segments or (107,)),
            out_features=33,
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
        x, step, zero = make_inputs(spec, tokens, seed=tokens)
        for bias in (False, True):
            assert_equals_reference(made, x, step, bias, zero)


@pytest.mark.usefixtures("kernel_runs")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_epilogue(dynamic: bool, group_size: int | None, dtype: torch.dtype) -> None:
    """The output and the bias have the model's dtype; a float32 constant may meet any output."""
    spec = make_spec(in_features=172, dynamic=dynamic, group_size=group_size, dtype=dtype)
    made, wide = make_linear(spec, bias=True), make_linear(spec, bias=True, offset=True)
    x, step, _ = make_inputs(spec, 7)
    for linear, bias in ((made, False), (made, True), (wide, True)):
        assert_equals_reference(linear, x, step, bias)


@pytest.mark.usefixtures("kernel_runs")
@pytest.mark.parametrize("weight_bits", [3, 4, 8])
@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("group_size", [None, 128])
def test_extreme_codes(weight_bits: int, activation_bits: int, group_size: int | None) -> None:
    """The longest sums of each sign, also with zero points at the other end of the range."""
    ends = [(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (activation_bits, weight_bits)]
    for a, w in itertools.product(*ends):
        far = ends[1][0] + ends[1][1] - w
        for zero in (None, far):
            spec = make_spec(
                in_features=130,
                out_features=3,
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                group_size=group_size,
                zero_points=zero is not None,
            )
            codes = torch.full((3, 130), w, dtype=torch.int8)
            zeros = None if zero is None else torch.full((3, spec.groups), zero, dtype=torch.int8)
            made = make_linear(spec, codes=codes, zero_points=zeros)
            made.stored.weight_step.fill_(1.0)
            y = assert_equals_reference(made, torch.full((2, 130), a, dtype=torch.int8))
            assert torch.equal(y, torch.full((2, 3), float(a * (w - (zero or 0)) * 130)))


@pytest.mark.usefixtures("kernel_runs")
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("step", [2.0**-133, 1e-30, 1e30, -1e-3, 0.0])
def test_extreme_steps(step: float, group_size: int | None) -> None:
    """Subnormal, overflowing, negative and zero steps, tokens and groups of zeros among them."""
    spec = make_spec(in_features=172, group_size=group_size, dynamic=True, dtype=torch.float16)
    made = make_linear(spec)
    made.stored.weight_step.fill_(step)
    x = random_codes(4, 4, 172)
    x[0] = 0
    x[1, :64] = 0
    for token_step in (1.0, 2.0**-20, 1e6):
        assert_equals_reference(made, x, torch.full((4, 1), token_step))
    wide = replace(made, spec=replace(spec, dtype=torch.float32))
    assert_equals_reference(wide, x, torch.full((4, 1), 0.01))


@pytest.mark.usefixtures("kernel_runs")
def test_rows_that_are_further_apart_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the quantizers' form for compilers hands over where reconstruction changed K."""
    made = make_linear(make_spec(in_features=200, out_features=40))
    prepared = KERNEL.prepare(made.stored, made.spec).to(DEVICE)
    codes = lay_out(random_codes(4, 5, 200), CodeLayout.INT8, prepared.columns).to(DEVICE)
    wide = torch.full((5, prepared.columns + 48), 99, dtype=torch.int8, device=DEVICE)
    wide[:, : prepared.columns] = codes
    wanted = prepared(codes, None, None, False)
    monkeypatch.setattr(Tensor, "contiguous", lambda self: pytest.fail("copied"))
    assert torch.equal(prepared(wide[:, : prepared.columns], None, None, False), wanted)


@pytest.mark.usefixtures("kernel_runs")
def test_leading_dimensions_and_strides() -> None:
    """Codes [2, 3, columns] and steps [2, 3, 1], both cut out of wider tensors."""
    made = make_linear(make_spec(in_features=128, dynamic=True))
    prepared = KERNEL.prepare(made.stored, made.spec)
    x = random_codes(4, 2, 3, 192)[..., 5:133]
    step = torch.rand(2, 3, 4)[..., :1]
    y = prepared.to(DEVICE)(x.to(DEVICE), step.to(DEVICE), None, False)
    assert torch.equal(y.cpu(), expected(made, x, step))


@pytest.mark.usefixtures("kernel_runs")
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "asymmetric"])
def test_what_lies_beyond_the_linear_does_not_matter(bits: int, zero_points: bool) -> None:
    """Codes beyond K against weights of 0, weights beyond K against codes of 0; rows beyond N."""
    n, k, tokens = 5, 100, 3
    layout = choose_layout(k, bits, None)
    x, w = random_codes(8, tokens, k, seed=1), random_codes(bits, n, k, seed=2)
    padding = layout.columns - k
    rows = torch.randint(-128, 128, (n + 64, layout.row_bytes), dtype=torch.int8)
    steps = torch.full((n + 64,), torch.nan)
    steps[:n] = 0.5
    zeros = torch.randint(-4, 4, (n + 64,), dtype=torch.int8)
    wanted = x.long() @ (w.long() - (zeros[:n, None].long() if zero_points else 0)).T * 0.5
    for dirty in ("codes", "weights"):
        fills = {name: random_codes(bits, n + tokens, padding) for name in ("codes", "weights")}
        fills["weights" if dirty == "codes" else "codes"].zero_()
        rows[:n] = to_kernel_layout(torch.cat((w, fills["weights"][:n]), 1), layout)
        codes = torch.cat((x, fills["codes"][:tokens]), 1)
        y = integer_linear_triton(
            torch.cat((codes, torch.full((64, layout.columns), 127, dtype=torch.int8)))[:tokens].to(
                DEVICE
            ),
            rows.to(DEVICE)[:n],
            steps.to(DEVICE)[None, :n],
            zeros.to(DEVICE)[None, :n] if zero_points else None,
            *(None, None, None, None, None),
            k,
            bits,
            None,
            None,
            torch.float32,
        )
        assert torch.equal(y.cpu(), wanted.float())


def operator_arguments(tokens: int, group_size: int | None, full: bool) -> tuple[object, ...]:
    """Arguments of the operator, with every optional tensor or with none."""
    shape = LinearShape(7, 64, 4, group_size)
    weight = to_kernel_layout(random_codes(4, 7, 64), shape.layout)
    zeros = random_codes(4, shape.groups, 7)
    tensors: list[Tensor | None] = [random_codes(4, tokens, shape.layout.columns), weight]
    sums, token_zero = zeros.to(torch.int32), make_token_zero(4, tokens)
    tensors += [torch.rand(shape.groups, 7), zeros, sums, None]
    tensors += [torch.rand(tokens, 1), token_zero, torch.randn(7)]
    if not full:
        tensors[3:] = [None] * 6
    return (*map(on_device, tensors), 64, 4, group_size, None, torch.bfloat16)


@pytest.mark.usefixtures("kernel_runs")
@pytest.mark.parametrize("full", [False, True], ids=["bare", "full"])
def test_operator_is_registered_soundly(full: bool) -> None:
    """Schema, fake implementation and dynamic shapes, by PyTorch's own check."""
    arguments = operator_arguments(5, 32 if full else None, full)
    torch.library.opcheck(integer_linear_triton, arguments)


@pytest.mark.usefixtures("kernel_runs")
def test_one_graph_for_all_lengths() -> None:
    """A full-graph compile sees one opaque operator, whatever the number of tokens."""
    keeper = GraphKeeper()
    made = make_linear(make_spec(in_features=128, out_features=7, dynamic=True), bias=True)
    prepared = KERNEL.prepare(made.stored, made.spec).to(DEVICE)
    compiled = torch.compile(prepared, fullgraph=True, dynamic=True, backend=keeper)
    for tokens in (2, 5, 65):
        x = random_codes(4, tokens, 128).to(DEVICE)
        step = make_token_step(tokens).to(DEVICE)
        assert torch.equal(compiled(x, step, None, True), prepared(x, step, None, True))
    assert len(keeper.graphs) == 1
    assert keeper.calls() == ["mergequant.integer_linear_triton.default"]


@pytest.mark.usefixtures("kernel_runs")
def test_rows_of_another_length_are_refused() -> None:
    codes, *others = operator_arguments(2, None, full=False)
    assert isinstance(codes, Tensor)
    with pytest.raises(ValueError, match="takes rows of 128 codes, not 64"):
        integer_linear_triton(codes[:, :64], *others)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight_bits": 5}, "it reads weights of 3, 4 and 8 bits and the layer has 5"),
        ({"activation_bits": 16}, "it takes codes of 4 and 8 bits and the layer has 16"),
        (
            {"group_size": 48},
            "it takes groups of whole multiples of 32 channels and the layer's have 48",
        ),
        (
            {"dtype": torch.float64},
            "it writes bfloat16, float16 and float32 and the model has torch.float64",
        ),
        (
            {"in_features": 131072, "activation_bits": 8},
            "its sums are exact up to 131071 channels and the layer adds 131072",
        ),
        (
            {"in_features": 70000, "segments": (32, 69968), "activation_bits": 8, "dynamic": True}
            | {"weight_bits": 8, "token_zero_points": True},
            "its sums are exact up to 65793 channels and the layer adds 69968",
        ),
        ({"segments": (32, 320), "dynamic": True, "token_zero_points": True}, None),
        ({"capability": 75}, "it needs compute capability 8.0 and the GPU has 7.5"),
        ({"device": "cpu"}, "it runs on GPUs (or with TRITON_INTERPRET=1) and the layer is on cpu"),
        ({"capability": 80}, None),
        ({"capability": 120, "in_features": 131072}, None),
        ({"group_size": 128, "in_features": 131072, "activation_bits": 8}, None),
    ],
    ids=str,
)
def test_refusals(
    changes: dict[str, object], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert KERNEL.refusal(make_spec(**{"device": "cuda", **changes})) == reason


def test_the_interpreter_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert KERNEL.refusal(make_spec()) is None


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (12, 0)], ids=str)
def test_asks_the_gpu_where_the_spec_does_not_say(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    refused = "it needs compute capability 8.0 and the GPU has 7.5"
    reason = KERNEL.refusal(make_spec(device="cuda"))
    assert reason == (refused if capability == (7, 5) else None)


def test_exact_channels_are_exact() -> None:
    """One channel more and a sum of extremes leaves int32."""
    forms = itertools.product((3, 4, 8), (4, 8), (False, True))
    for weight_bits, activation_bits, zero_points in forms:
        spec: LinearSpec = make_spec(
            weight_bits=weight_bits, activation_bits=activation_bits, zero_points=zero_points
        )
        shifted = 2 ** (weight_bits - 1) * 2 ** (8 - weight_bits) * 2 ** (activation_bits - 1)
        centred = (2**weight_bits - 1) * 2 ** (activation_bits - 1) if zero_points else 0
        largest = max(shifted, centred)
        most = exact_columns(spec, INT32, SHIFTED)
        assert most * largest < 2**31 <= (most + 1) * largest


@pytest.mark.parametrize("stub", [None, types.ModuleType("triton")], ids=["absent", "stub"])
def test_refuses_without_triton(
    stub: types.ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", stub)
    monkeypatch.delitem(sys.modules, "triton.language", raising=False)
    reason = KERNEL.refusal(make_spec(device="cuda"))
    assert reason is not None
    assert reason.startswith("Triton cannot be imported (")

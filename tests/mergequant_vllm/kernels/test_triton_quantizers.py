"""The Triton quantizers equal their definitions: on a GPU where there is one, else interpreted."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.norm_round import reference as norm_round
from mergequant_vllm.kernels.norm_round import triton as norm_round_triton
from mergequant_vllm.kernels.token_quant import reference as token_quant
from mergequant_vllm.kernels.token_quant import triton as token_quant_triton
from tests.mergequant_vllm.kernels.graphs import GraphKeeper
from tests.mergequant_vllm.kernels.programs import forget_programs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULES = (norm_round_triton, token_quant_triton)

SIZES = [1, 7, 43, 127, 128, 129, 352, 4096]
SHAPES = [(tokens, K) for tokens in (0, 1, 2, 7) for K in SIZES if tokens * K <= 4096]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FORMATS = [
    (CodeLayout.FLOAT32, 4),
    (CodeLayout.FLOAT32, 8),
    (CodeLayout.INT8, 4),
    (CodeLayout.INT8, 8),
    (CodeLayout.NIBBLES, 4),
]

runs = pytest.mark.usefixtures("kernels_run")
# The interpreter computes with numpy, which reports what is meant here.
hostile = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture
def kernels_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without a GPU, programs are loaded for the interpreter and forgotten after the test.

    They write into poisoned memory.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    empty_codes = norm_round_triton.empty_codes

    def poisoned(x: Tensor, K: int, layout: str, columns: int) -> Tensor:
        codes = empty_codes(x, K, layout, columns)
        return codes.fill_(torch.nan if codes.is_floating_point() else 0x5A)

    for module in MODULES:
        monkeypatch.setattr(module, "empty_codes", poisoned)
    forget_programs()
    yield
    forget_programs()


def random(*shape: int, scale: float = 5.0, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def even(columns: int) -> int:
    return columns + columns % 2


def on_device(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def assert_same(result: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and values; NaN equals NaN."""
    result = result.cpu()
    assert result.dtype == expected.dtype and result.shape == expected.shape
    if result.is_floating_point():
        assert torch.equal(result.isnan(), expected.isnan())
        result, expected = result.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)
    assert torch.equal(result, expected)


def check_static(x: Tensor, bits: int, layout: CodeLayout, **arguments: Any) -> None:
    expected = norm_round.static_codes(x, bits, layout, **arguments)
    moved = {name: on_device(value) for name, value in arguments.items()}
    result = norm_round_triton.static_codes(x.to(DEVICE), bits, layout, **moved)
    assert_same(result, expected)


def check_tokens(
    x: Tensor, bits: int, layout: CodeLayout, clip: float = 0.9, **arguments: Any
) -> None:
    ratio = torch.tensor([clip])
    for zero_points in (False, True):
        form = {**arguments, "zero_points": zero_points}
        expected = token_quant.token_codes(x, ratio, bits, layout, **form)
        result = token_quant_triton.token_codes(
            x.to(DEVICE), ratio.to(DEVICE), bits, layout, **form
        )
        for mine, wanted in zip(result, expected, strict=True):
            if wanted is None:
                assert mine is None
            elif wanted.dtype != torch.int32 or expected[1].isfinite().all():
                assert mine is not None
                assert_same(mine, wanted)


@runs
@pytest.mark.parametrize(("tokens", "K"), SHAPES)
def test_static_sizes(tokens: int, K: int) -> None:
    x = random(tokens, K).to(torch.bfloat16)
    check_static(x, 4, CodeLayout.INT8)
    check_static(x, 4, CodeLayout.NIBBLES, columns=even(K))


@runs
@pytest.mark.parametrize("layout", CodeLayout, ids=str)
def test_static_many_tokens(layout: CodeLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles of several tokens, the last one not full."""
    monkeypatch.setattr(norm_round_triton, "MANY_TOKENS", 129)
    index = torch.arange(43, dtype=torch.int32).flip(0)
    x = random(129, 43)
    check_static(x, 4, layout, index=index, offset=random(43, scale=0.3), columns=44)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layout", "bits"), FORMATS, ids=str)
def test_static_formats(layout: CodeLayout, bits: int, dtype: torch.dtype) -> None:
    x = random(3, 129, scale=2.0**bits / 4).to(dtype)
    check_static(x, bits, layout, columns=130)


@runs
@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("K", [1, 43, 128, 129, 200])
def test_static_gather(K: int, with_offset: bool) -> None:
    """K below, at and above n = 128, with channels read twice and channels not read."""
    generator = torch.Generator().manual_seed(K)
    index = torch.randint(0, 128, (K,), generator=generator, dtype=torch.int32)
    offset = random(K, scale=0.4) if with_offset else None
    x = random(2, 128).to(torch.bfloat16)
    check_static(x, 4, CodeLayout.INT8, index=index, offset=offset)
    check_static(x, 4, CodeLayout.NIBBLES, index=index, offset=offset, columns=256)


@runs
def test_static_offset_alone() -> None:
    check_static(random(2, 43).to(torch.float16), 4, CodeLayout.INT8, offset=random(43, scale=0.4))


@runs
@pytest.mark.parametrize("columns", [44, 64, 128, 1022, 2050])
@pytest.mark.parametrize("layout", CodeLayout, ids=str)
def test_static_padding(layout: CodeLayout, columns: int) -> None:
    """Up to whole tiles of it; an offset must not reach it."""
    index = torch.arange(43, dtype=torch.int32)
    check_static(random(2, 43), 4, layout, columns=columns)
    check_static(random(2, 43), 4, layout, index=index, offset=torch.ones(43), columns=columns)


@runs
@hostile
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_static_every_16_bit_value(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ties and neighbours of ties, infinities, subnormal numbers; NaN as 0."""
    monkeypatch.setattr(norm_round_triton, "TILE_COLUMNS", 2**16)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = patterns.view(dtype).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    for layout, bits in FORMATS:
        check_static(x[None], bits, layout)


@runs
@pytest.mark.parametrize(("layout", "bits"), FORMATS, ids=str)
def test_static_ties_and_neighbours_in_float32(layout: CodeLayout, bits: int) -> None:
    ties = torch.arange(-(2 ** (bits - 1)) - 4, 2 ** (bits - 1) + 4) + 0.5
    up, down = (torch.nextafter(ties, torch.tensor(to)) for to in (torch.inf, -torch.inf))
    far = torch.tensor([1e30, -1e30, 1e-38, -1e-40, torch.inf, -torch.inf, 2.0**22, -(2.0**23) - 1])
    x = torch.cat((ties, up, down, far))[None]
    check_static(x, bits, layout, columns=even(x.shape[1]))


@runs
@hostile
def test_static_not_a_number() -> None:
    """NaN where the layout has one, else 0; neighbours in a byte keep theirs."""
    x = torch.tensor([[torch.nan, 3.0, -8.0, torch.nan]])
    check_static(x, 4, CodeLayout.FLOAT32)
    for layout, expected in ((CodeLayout.INT8, [0, 3, -8, 0]), (CodeLayout.NIBBLES, [0x80, 0x03])):
        assert norm_round_triton.static_codes(x.to(DEVICE), 4, layout).tolist() == [expected]


@runs
def test_strides() -> None:
    """Rows cut out of wider ones, leading dimensions, and a last dimension that is not contiguous.

    The memory around the rows is NaN.
    """
    wide = torch.full((2, 2, 64), torch.nan)
    wide[..., 5:48] = random(2, 2, 43)
    cut = wide[..., 5:48]
    for x in (cut, cut[:, 1], cut.transpose(0, 1), cut[0].T.contiguous().T, cut[0, :, :1]):
        check_static(x, 4, CodeLayout.INT8)
        check_tokens(x, 4, CodeLayout.INT8)


@runs
@pytest.mark.parametrize(("tokens", "K"), SHAPES)
def test_token_sizes(tokens: int, K: int) -> None:
    x = random(tokens, K).to(torch.bfloat16)
    check_tokens(x, 4, CodeLayout.INT8)
    check_tokens(x[:1], 4, CodeLayout.NIBBLES, columns=even(K))


@runs
def test_many_tokens_with_their_own_steps() -> None:
    check_tokens(random(129, 129) * torch.logspace(-20, 20, 129)[:, None], 4, CodeLayout.INT8)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("layout", "bits"), FORMATS, ids=str)
def test_token_formats(layout: CodeLayout, bits: int, dtype: torch.dtype) -> None:
    x = random(2, 352).to(dtype)
    check_tokens(x, bits, layout)
    check_tokens(x, bits, layout, hadamard=32)


@runs
@pytest.mark.parametrize("clip", [1.0, 0.95, 0.7, 1 / 3, 1e-3])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_token_clip_ratios(bits: int, clip: float) -> None:
    check_tokens(random(3, 352), bits, CodeLayout.INT8, clip)


@runs
@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("blocks", [1, 3])
def test_token_hadamard(blocks: int, block: int) -> None:
    K = blocks * block
    x = random(2, K, seed=block) + 0.2
    check_tokens(x, 8, CodeLayout.FLOAT32, hadamard=block)
    check_tokens(x.to(torch.bfloat16), 4, CodeLayout.NIBBLES, hadamard=block, columns=even(K))


@runs
def test_token_hadamard_of_a_layer() -> None:
    check_tokens(random(2, 4096).to(torch.bfloat16), 4, CodeLayout.NIBBLES, hadamard=128)


@runs
def test_no_tokens_with_hadamard() -> None:
    x, clip = torch.empty(0, 256, device=DEVICE), torch.ones(1, device=DEVICE)
    codes, step, _ = token_quant_triton.token_codes(x, clip, 4, CodeLayout.INT8, hadamard=128)
    assert codes.shape == (0, 256) and step.shape == (0, 1)


@runs
@pytest.mark.parametrize("hadamard", [None, 64, 128])
@pytest.mark.parametrize(("K", "columns"), [(256, 256), (384, 640), (512, 512)])
def test_token_rows_in_chunks(
    K: int, columns: int, hadamard: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows longer than a program holds: the largest value in each chunk once, padding of chunks."""
    monkeypatch.setattr(token_quant_triton, "ROW_COLUMNS", 128)
    x = random(3, K)
    x[torch.arange(3), torch.tensor([0, K // 2, K - 1])] = 40.0
    check_tokens(x[:2], 4, CodeLayout.INT8, hadamard=hadamard, columns=columns)
    check_tokens(x[1:], 4, CodeLayout.NIBBLES, hadamard=hadamard, columns=columns)


@runs
@pytest.mark.parametrize("columns", [44, 64, 128, 1022])
@pytest.mark.parametrize("layout", CodeLayout, ids=str)
def test_token_padding(layout: CodeLayout, columns: int) -> None:
    check_tokens(random(2, 43), 4, layout, columns=columns)


@runs
@hostile
@pytest.mark.parametrize("hadamard", [None, 2])
@pytest.mark.parametrize(("layout", "bits"), FORMATS, ids=str)
def test_token_extremes(layout: CodeLayout, bits: int, hadamard: int | None) -> None:
    """Zero, huge, tiny and subnormal tokens, and tokens that overflow as they are rotated."""
    rows = random(1, 8).repeat(9, 1)
    rows[0] = 0.0
    rows[1:5] *= torch.tensor([1e30, 1e-30, 1e-38, 1e-42])[:, None]
    rows[5] = torch.finfo(torch.float32).max
    rows[6] = torch.tensor(2.0**-149)
    rows[7:, 0] = 1e38
    rows[8, 0] = -3e38
    check_tokens(rows, bits, layout, hadamard=hadamard)


@runs
@hostile
@pytest.mark.parametrize("hadamard", [None, 2])
def test_token_not_finite(hadamard: int | None) -> None:
    """Padding is 0 in spite of them, and other tokens and other blocks are as they were."""
    x = random(4, 6)
    x[0, 1], x[1, 2], x[2, 3] = torch.nan, torch.inf, -torch.inf
    check_tokens(x, 4, CodeLayout.FLOAT32, hadamard=hadamard, columns=8)
    ratio = torch.tensor([0.9])
    expected, _, _ = token_quant.token_codes(x, ratio, 4, CodeLayout.FLOAT32, hadamard=hadamard)
    codes, _, _ = token_quant_triton.token_codes(
        x.to(DEVICE), ratio.to(DEVICE), 4, CodeLayout.INT8, hadamard=hadamard
    )
    assert torch.equal(codes.cpu(), expected.nan_to_num(nan=0.0).to(torch.int8))


@runs
@pytest.mark.parametrize(("layout", "bits"), FORMATS, ids=str)
def test_token_ties(layout: CodeLayout, bits: int) -> None:
    """A step of exactly 1, so that halves are ties."""
    largest = 2 ** (bits - 1) - 1
    ties = torch.arange(-largest, largest) + 0.5
    x = torch.cat((ties, torch.tensor([float(largest)] * 2)))[None]
    check_tokens(x, bits, layout, clip=1.0)


@runs
@pytest.mark.parametrize("block", [3, 12, 64])
def test_refuses_blocks_that_do_not_fit(block: int) -> None:
    x, clip = random(1, 96).to(DEVICE), torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match=f"divides K = 96, not {block}"):
        token_quant_triton.token_codes(x, clip, 4, CodeLayout.INT8, hadamard=block)


@pytest.mark.parametrize(
    ("layout", "columns"),
    [(CodeLayout.NIBBLES, 43), (CodeLayout.NIBBLES, 42), (CodeLayout.INT8, 42)],
)
def test_refuses_columns_that_do_not_hold_the_codes(layout: CodeLayout, columns: int) -> None:
    x, clip = random(1, 43).to(DEVICE), torch.ones(1, device=DEVICE)
    with pytest.raises(
        ValueError, match=f"{columns} columns do not hold 43 codes as {layout.value}"
    ):
        norm_round_triton.static_codes(x, 4, layout, columns=columns)
    with pytest.raises(
        ValueError, match=f"{columns} columns do not hold 43 codes as {layout.value}"
    ):
        token_quant_triton.token_codes(x, clip, 4, layout, columns=columns)


# Operators.


@runs
@pytest.mark.parametrize("optional", [False, True])
def test_operators_are_registered_soundly(optional: bool) -> None:
    """Schema, fake implementation and dynamic shapes, by PyTorch's own check."""
    x, clip = random(2, 3, 8).to(DEVICE), torch.ones(1, device=DEVICE)
    index = torch.zeros(6, dtype=torch.int32, device=DEVICE) if optional else None
    offset = torch.ones(6, device=DEVICE) if optional else None
    static = torch.ops.mergequant.static_codes_triton.default
    tokens = torch.ops.mergequant.token_codes_triton.default
    torch.library.opcheck(static, (x, 4, "nibbles", index, offset, 10))
    torch.library.opcheck(tokens, (x, clip, 4, "int8", 4 if optional else None, 10, optional))


@runs
@pytest.mark.parametrize("layout", CodeLayout, ids=str)
def test_fake_results_are_like_real_ones(layout: CodeLayout) -> None:
    x, clip = random(2, 3, 8).to(DEVICE), torch.ones(1, device=DEVICE)

    def quantize(x: Tensor, clip: Tensor) -> list[Tensor]:
        form: dict[str, Any] = {"hadamard": 8, "columns": 10, "zero_points": True}
        codes, step, zero = token_quant_triton.token_codes(x, clip, 4, layout, **form)
        assert zero is not None
        return [norm_round_triton.static_codes(x, 4, layout, columns=10), codes, step, zero]

    with FakeTensorMode() as mode:
        fakes = quantize(mode.from_tensor(x), mode.from_tensor(clip))
    for fake, real in zip(fakes, quantize(x, clip), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
        assert fake.device == real.device


@runs
def test_one_graph_for_all_lengths() -> None:
    """A full-graph compile sees two opaque operators, whatever the number of tokens."""
    keeper = GraphKeeper()

    def quantize(x: Tensor, clip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        static = norm_round_triton.static_codes(x, 4, CodeLayout.NIBBLES)
        return static, *token_quant_triton.token_codes(x, clip, 4, CodeLayout.INT8, hadamard=2)[:2]

    compiled = torch.compile(quantize, fullgraph=True, dynamic=True, backend=keeper)
    for tokens in (2, 5, 9):
        arguments = (random(tokens, 6).to(DEVICE), torch.ones(1, device=DEVICE))
        for result, expected in zip(compiled(*arguments), quantize(*arguments), strict=True):
            assert torch.equal(result, expected)
    assert len(keeper.graphs) == 1
    assert [name for name in keeper.calls() if name.startswith("mergequant")] == [
        "mergequant.static_codes_triton.default",
        "mergequant.token_codes_triton.default",
    ]

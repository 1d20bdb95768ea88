"""Static rounding, per-token quantization and code layouts, against exact arithmetic."""

from fractions import Fraction

import pytest
import torch

from mergequant_vllm.kernels import native_library as native
from mergequant_vllm.kernels.codes import CodeLayout, CodeWriter, lay_out, nibble_order, read_codes
from mergequant_vllm.kernels.hadamard.reference import rotate
from mergequant_vllm.kernels.norm_round.reference import static_codes
from mergequant_vllm.kernels.selection.quantizers import CodeForm, StaticQuantizer, TokenQuantizer
from mergequant_vllm.kernels.token_quant.reference import token_codes
from tests.mergequant_vllm.kernels.graphs import GraphKeeper

INT8 = CodeLayout.INT8


def test_static_codes_round_and_clamp() -> None:
    x = torch.tensor([[-9.0, -0.5, 0.5, 1.5, 6.6, 99.0]], dtype=torch.bfloat16)
    assert static_codes(x, 4, INT8).tolist() == [[-8, 0, 0, 2, 7, 7]]
    assert static_codes(x, 8, INT8).tolist() == [[-9, 0, 0, 2, 7, 99]]


def test_what_only_the_compiler_reads_is_planned_for_gpus_only() -> None:
    offset, device = torch.zeros(80), torch.device("cpu")
    for writer, planned in (
        (CodeWriter.REFERENCE, set()),
        (CodeWriter.GPU, {"slab_0_offset", "slab_1_offset"}),
    ):
        form = CodeForm(4, INT8, 128, writer=writer)
        quantizer = StaticQuantizer(form, 64, torch.arange(80) % 64, offset, device)
        buffers = {name for name, _ in quantizer.named_buffers()}
        assert {"index", "offset"} <= buffers
        assert {name for name in buffers if name.endswith("_offset")} == planned


def test_static_codes_gather_then_shift_then_round_then_pad() -> None:
    x = torch.tensor([[0.4, 2.4, -3.0]])
    index = torch.tensor([1, 1, 0, 2, 2], dtype=torch.int32)
    offset = torch.tensor([-0.25, 0.25, 0.0, 0.25, -0.75])
    codes = static_codes(x, 4, INT8, index=index, offset=offset, columns=8)
    assert codes.tolist() == [[2, 3, 0, -3, -4, 0, 0, 0]]


@pytest.mark.parametrize("layout", list(CodeLayout))
def test_layouts_are_read_back(layout: CodeLayout) -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).reshape(2, 8)
    padded = torch.nn.functional.pad(codes, (0, 4))
    for given in (codes, codes.to(torch.float32)):
        assert torch.equal(read_codes(lay_out(given, layout, 12), layout), padded)


def test_the_first_half_is_in_the_low_nibbles() -> None:
    laid_out = lay_out(torch.tensor([[1, -2, 7, -8]]), CodeLayout.NIBBLES, 4)
    assert laid_out.dtype == torch.uint8
    assert laid_out.tolist() == [[0x71, 0x8E]]
    assert nibble_order(6).tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("bits", [4, 8])
def test_token_codes_are_the_nearest_integers_to_the_exact_quotients(bits: int) -> None:
    largest = 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 33, generator=generator)
    clip = torch.tensor([0.7])
    codes, step, _ = token_codes(x, clip, bits, INT8)
    for row, row_codes in zip(x.tolist(), codes.tolist(), strict=True):
        exact_step = Fraction(0.7) * max(abs(Fraction(v)) for v in row) / largest
        for value, code in zip(row, row_codes, strict=True):
            quotient = Fraction(value) / exact_step
            nearest = min(max(round(quotient), -largest - 1), largest)
            # Five float32 roundings stand between the quotient and the code.
            near_tie = (
                abs(abs(quotient - round(quotient)) - Fraction(1, 2)) < abs(quotient) * 2**-21
            )
            assert code == nearest or near_tie
    expected = x.abs().amax(-1, keepdim=True) * clip * (1 / largest)
    assert torch.equal(step, expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.7])
def test_zero_points_move_the_codes_to_the_tokens_range(bits: int, clip: float) -> None:
    """Against float64; a difference of one is left to near ties."""
    x = torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    x[0], x[1], x[2] = x[0].abs() + 1, -x[1].abs() - 1, 0
    codes, step, zero = token_codes(x, torch.tensor([clip]), bits, INT8, zero_points=True)
    assert zero is not None and zero.dtype == torch.int32 and zero.shape == (64, 1)
    half, z = 2 ** (bits - 1), x.double()
    low, high = z.amin(1, keepdim=True).clamp(max=0), z.amax(1, keepdim=True).clamp(min=0)
    wide = ((high - low) * clip / (2**bits - 1)).clamp(min=2.0**-100)
    assert torch.allclose(step.double(), wide, rtol=1e-6)
    exact_zero = torch.round(-half - low * clip / wide).clamp(-half, half - 1)
    assert (zero - exact_zero).abs().max() <= 1
    exact = torch.round(z / step + zero).clamp(-half, half - 1)
    off = (codes - exact).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 1e-3
    if clip == 1.0:  # no value is more than half a step from its code
        assert ((codes - zero) * step - x).abs().max() <= (0.5 + 2**-10) * step.max()
    assert codes[2].eq(zero[2]).all()


def test_zero_points_reach_the_quantizer_and_no_compiler_looks_into_them() -> None:
    x, clip = torch.randn(5, 24), torch.tensor([0.9])
    for writer in (CodeWriter.REFERENCE, CodeWriter.NATIVE):
        if writer is CodeWriter.NATIVE and native.refusal() is not None:
            continue
        quantizer = TokenQuantizer(CodeForm(4, INT8, 32, writer), clip, 8, zero_points=True)
        wanted = token_codes(x, clip, 4, INT8, hadamard=8, columns=32, zero_points=True)
        keeper = GraphKeeper()
        compiled = torch.compile(quantizer, fullgraph=True, backend=keeper)
        for quantized in (quantizer(x), compiled(x)):
            for mine, theirs in zip(quantized, wanted, strict=True):
                assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        assert all("mergequant" in name or "getitem" in name for name in keeper.calls())


def test_rotation_comes_before_the_step() -> None:
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    clip = torch.tensor([0.9])
    codes, step, _ = token_codes(x, clip, 4, INT8, hadamard=8, columns=32)
    plain, plain_step, _ = token_codes(rotate(x, 8), clip, 4, INT8, columns=32)
    assert torch.equal(codes, plain) and torch.equal(step, plain_step)
    assert not torch.equal(codes, token_codes(x, clip, 4, INT8, columns=32)[0])


def test_a_token_of_zeros_has_codes_zero_and_a_finite_step() -> None:
    codes, step, _ = token_codes(torch.zeros(2, 8), torch.ones(1), 4, INT8)
    assert codes.eq(0).all()
    assert torch.isfinite(step).all() and step.gt(0).all()


def test_huge_and_tiny_tokens_keep_their_codes() -> None:
    row = torch.tensor([-7.0, -3.0, 0.0, 1.0, 7.0])
    for scale in (2.0**-80, 1.0, 2.0**120):
        codes, _, _ = token_codes(row * scale, torch.ones(1), 4, INT8)
        assert codes.tolist() == [-7, -3, 0, 1, 7]

"""The block Hadamard rotation: the butterfly against the matrix, Triton against the butterfly."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout, CodeWriter
from mergequant_vllm.kernels.hadamard.operator import mix_heads_opaque
from mergequant_vllm.kernels.hadamard.reference import (
    hadamard_matrix,
    hartley_matrix,
    heads_matrix,
    mix_heads,
    mix_heads_by_matrix,
    rotate,
    rotate_by_matrix,
)
from mergequant_vllm.kernels.selection.quantizers import CodeForm, TokenQuantizer
from mergequant_vllm.kernels.token_quant.reference import token_codes
from tests.mergequant_vllm.kernels.programs import forget_programs

if TYPE_CHECKING:
    import triton.language as tl

    from mergequant_vllm.kernels.hadamard.program import rotate_row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = [2, 4, 8, 16, 32, 64, 128]


def random(*shape: int, seed: int = 0) -> Tensor:
    """float64, of several magnitudes and with a mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x * torch.rand(*shape, generator=generator, dtype=torch.float64) * 10 + 0.3


def block_sums(x: Tensor, block: int) -> Tensor:
    """Sum of |x| over each value's block, in x's shape: [..., K]."""
    sums = x.abs().reshape(*x.shape[:-1], -1, block).sum(-1)
    return sums.repeat_interleave(block, dim=-1)


def rotation_error(x: Tensor, block: int, unit: float) -> Tensor:
    """Bound on the error of `rotate`: a rounding a stage, two in 1 / sqrt(block), one of a product.

    Each is of a sum of at most the block's values, which 1 / sqrt(block) scales at the end.
    """
    roundings = math.log2(block) + 3
    return 1.01 * roundings * unit * block_sums(x, block) / math.sqrt(block)


@pytest.mark.parametrize("block", BLOCKS)
def test_matrix_is_symmetric_orthonormal_and_of_signs_alone(block: int) -> None:
    matrix = hadamard_matrix(block)
    signs = (matrix * math.sqrt(block)).round()
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix, signs / math.sqrt(block)) and signs.abs().eq(1).all()
    assert torch.equal(signs @ signs, torch.eye(block, dtype=torch.float64) * block)


@pytest.mark.parametrize("block", BLOCKS)
def test_matrix_is_sylvesters(block: int) -> None:
    negative = [[bool((i & j).bit_count() % 2) for j in range(block)] for i in range(block)]
    assert torch.equal(hadamard_matrix(block) < 0, torch.tensor(negative))


@pytest.mark.parametrize("block", [0, 3, 12, -2])
def test_blocks_are_powers_of_two(block: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard_matrix(block)


@pytest.mark.parametrize("block", BLOCKS)
def test_butterfly_equals_the_matrix_product(block: int) -> None:
    """In float64, to the roundings of both: the product's sum of `block` values has that many."""
    x = random(2, 5, 3 * block)
    unit = 2.0**-53
    product_error = 1.01 * (block + 2) * unit * block_sums(x, block) / math.sqrt(block)
    error = (rotate(x, block) - rotate_by_matrix(x, block)).abs()
    assert error.le(rotation_error(x, block, unit) + product_error).all()


@pytest.mark.parametrize("block", BLOCKS)
def test_butterfly_in_float32_is_off_by_its_roundings(block: int) -> None:
    x = random(7, 3 * block).to(torch.float32)
    exact = rotate(x.to(torch.float64), block)
    assert (rotate(x, block) - exact).abs().le(rotation_error(x, block, 2.0**-24)).all()


@pytest.mark.parametrize("block", BLOCKS)
def test_twice_is_the_identity(block: int) -> None:
    """The second rotation spreads the first one's error over sqrt(block) and adds its own."""
    x = random(7, 3 * block)
    rotated = rotate(x, block)
    first = rotation_error(x, block, 2.0**-53) * math.sqrt(block)
    error = (rotate(rotated, block) - x).abs()
    assert error.le(first + rotation_error(rotated, block, 2.0**-53)).all()


@pytest.mark.parametrize("block", BLOCKS)
def test_unit_vectors_give_the_matrix(block: int) -> None:
    eye = torch.eye(block, dtype=torch.float64)
    assert torch.equal(rotate(eye, block), hadamard_matrix(block).sign() * (1 / math.sqrt(block)))


def test_block_of_one_changes_nothing() -> None:
    x = random(3, 7).to(torch.float32)
    assert torch.equal(rotate(x, 1), x)


def rotate_program(
    x: tl.tensor,
    out: tl.tensor,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    ROOT: tl.constexpr,
) -> None:
    """`rotate_row` between a load and a store; source of a Triton kernel."""
    place = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(out + place, rotate_row(tl.load(x + place), COLUMNS, STAGES, ROOT))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("blocks", [1, 2, 16])
@pytest.mark.parametrize("block", BLOCKS)
def test_triton_equals_the_butterfly(
    block: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, also where sums cancel, overflow and are subnormal."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    forget_programs()
    from mergequant_vllm.kernels.hadamard import program

    names = {"tl": triton.language, "rotate_row": program.rotate_row}
    for name, value in names.items():
        monkeypatch.setitem(globals(), name, value)
    x = random(4, blocks * block, seed=block).to(torch.float32)
    x[1] *= 2.0**125
    x[2] *= 2.0**-140
    x[3] = x[3].round()
    out = torch.full_like(x, torch.nan, device=DEVICE)
    constants = {"COLUMNS": x.shape[1], "STAGES": block.bit_length() - 1}
    triton.jit(rotate_program)[(4,)](
        x.to(DEVICE), out, ROOT=1 / math.sqrt(block), enable_fp_fusion=False, **constants
    )
    forget_programs()
    expected = rotate(x, block)
    assert torch.equal(out.cpu().nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))


HEADS = [(1, 5), (2, 3), (3, 4), (4, 64), (5, 1), (7, 8), (12, 16), (28, 4), (32, 128), (40, 2)]


@pytest.mark.parametrize("size", [1, 3, 5, 7, 15])
def test_hartleys_matrix_is_symmetric_orthonormal_and_dense(size: int) -> None:
    matrix = hartley_matrix(size)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-15)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64))
    assert matrix.ne(0).all()


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads_are_mixed_as_the_matrix_does(heads: tuple[int, int]) -> None:
    count, width = heads
    x = random(3, 2, count * width).to(torch.float32)
    y, exact = mix_heads(x, heads), mix_heads_by_matrix(x, heads)
    assert y.dtype == torch.float32 and y.shape == x.shape
    # A rounding a stage, two a term of the odd factor, and the factors' own.
    roundings = 2 * math.log2(count & -count) + 2 * (count // (count & -count)) + 4
    sums = x.double().abs().reshape(3, 2, count, width).sum(2).repeat(1, 1, count)
    largest = heads_matrix(count).abs().max()
    assert ((y - exact).abs() <= roundings * 2.0**-24 * sums * largest).all()
    torch.testing.assert_close(mix_heads_by_matrix(exact, heads), x.double())


def test_the_sums_of_heads_round_one_by_one() -> None:
    """Against Python's own order of operations, value by value."""
    x = random(2, 7 * 3).to(torch.float32)
    mixing = hartley_matrix(7).to(torch.float32)
    wanted = torch.empty_like(x)
    for t in range(2):
        for i in range(7):
            for c in range(3):
                total = x[t, c] * mixing[0, i]
                for j in range(1, 7):
                    total = total + x[t, 3 * j + c] * mixing[j, i]
                wanted[t, 3 * i + c] = total
    assert torch.equal(mix_heads(x, (7, 3)), wanted)
    assert torch.equal(mix_heads(x.bfloat16(), (7, 3)), mix_heads(x.bfloat16().float(), (7, 3)))


def test_a_power_of_two_of_heads_of_one_channel_is_the_rotation() -> None:
    x = random(3, 16).to(torch.float32)
    assert torch.equal(mix_heads(x, (16, 1)), rotate(x, 16))


def test_heads_are_mixed_before_the_blocks_and_the_step() -> None:
    x, clip = random(5, 24).to(torch.bfloat16), torch.tensor([0.9])
    form = CodeForm(4, CodeLayout.INT8, 32, CodeWriter.REFERENCE)
    quantizer = TokenQuantizer(form, clip, 8, zero_points=True, heads=(3, 8))
    wanted = token_codes(
        mix_heads(x, (3, 8)), clip, 4, form.layout, hadamard=8, columns=32, zero_points=True
    )
    for tensor, expected in zip(quantizer(x), wanted, strict=True):
        assert expected is not None and torch.equal(tensor, expected)
    with pytest.raises(ValueError, match="0 heads of 8 channels"):
        TokenQuantizer(form, clip, None, heads=(0, 8))


def test_the_mixing_is_one_operator_to_a_compiler() -> None:
    torch.library.opcheck(mix_heads_opaque, (random(3, 24).to(torch.bfloat16), 3, 8))

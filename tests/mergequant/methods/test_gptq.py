"""GPTQ: the blocked form equals the column-by-column definition, on correlated data."""

from itertools import product

import pytest
import torch
from torch import Tensor

from mergequant.methods.gptq import (
    NotPositiveDefiniteError,
    gptq,
    gptq_by_column,
    invert_hessian,
    output_loss,
    round_to_nearest,
)
from mergequant_vllm.rounding import largest_code, round_to_codes, smallest_code
from tests.forms import Form, make_grid

FORMS = [
    Form(bits, group_size, asymmetric, search)
    for bits, group_size, asymmetric in product((3, 4, 8), (None, 32), (False, True))
    for search in ("minmax", "mse")
]
PLAIN = Form()


def correlated_hessian(columns: int, tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    return 2 * x.T @ x / tokens


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(rows + 1000 * seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def brain_surgeon(weight: Tensor, form: Form, hessian: Tensor, damping: float) -> Tensor:
    """Eq. 2 of Frantar et al.: the columns that are left are inverted anew at each turn."""
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    grid = make_grid(weight, form)
    step, zero = grid.columns(torch.arange(len(hessian)))
    w, codes = weight.clone(), torch.empty_like(weight, dtype=torch.int8)
    left = hessian.diagonal().argsort(descending=True, stable=True)
    while len(left):
        k = left[0]
        inverse = torch.linalg.inv(damped[left][:, left])
        code = round_to_codes(w[:, k] / step[:, k] + zero[:, k], form.bits)
        error = w[:, k] - (code - zero[:, k]) * step[:, k]
        w[:, left] -= torch.outer(error, inverse[0] / inverse[0, 0])
        codes[:, k] = code.to(torch.int8)
        left = left[1:]
    return codes


@pytest.mark.parametrize("columns", [1, 7, 127, 128, 129, 172])
@pytest.mark.parametrize("block", [1, 16, 128])
def test_blocks_do_not_change_the_codes(columns: int, block: int) -> None:
    inverse = invert_hessian(correlated_hessian(columns, 4 * columns, columns), 0.01)
    weight = random_weight(11, columns)
    grid = make_grid(weight, PLAIN)
    assert torch.equal(gptq(weight, grid, inverse, block), gptq_by_column(weight, grid, inverse))


SEGMENTS = Form(4, search="mse", segments=(32, 64, 33))


@pytest.mark.parametrize("form", [*FORMS, SEGMENTS], ids=str)
def test_blocks_do_not_change_the_codes_of_any_form(form: Form) -> None:
    inverse = invert_hessian(correlated_hessian(129, 500, 3), 0.01)
    weight = random_weight(11, 129)
    grid = make_grid(weight, form)
    codes = gptq(weight, grid, inverse, 50)
    assert torch.equal(codes, gptq_by_column(weight, grid, inverse))
    assert codes.dtype == torch.int8
    assert smallest_code(form.bits) <= int(codes.min())
    assert int(codes.max()) <= largest_code(form.bits)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_factor_is_that_of_columns_removed_one_by_one(form: Form) -> None:
    hessian, weight = correlated_hessian(40, 200, 4), random_weight(6, 40)
    codes = gptq(weight, make_grid(weight, form), invert_hessian(hessian, 0.01), 16)
    assert torch.equal(codes, brain_surgeon(weight, form, hessian, 0.01))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gptq_beats_rounding_on_correlated_activations(form: Form, seed: int) -> None:
    hessian, weight = correlated_hessian(96, 400, seed), random_weight(32, 96, seed)
    grid = make_grid(weight, form)
    codes = gptq(weight, grid, invert_hessian(hessian, 0.01), 32)
    nearest = output_loss(weight, round_to_nearest(weight, grid), grid, hessian)
    assert output_loss(weight, codes, grid, hessian) < 0.7 * nearest


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_3_bits_in_groups_beat_3_bits_with_zero_points_where_columns_are_uneven(seed: int) -> None:
    """Table 5's two rows of 3-bit weights."""
    hessian = correlated_hessian(128, 500, seed)
    weight = random_weight(32, 128, seed) * torch.logspace(-1, 1, 128, dtype=torch.float64)
    inverse, losses = invert_hessian(hessian, 0.01), []
    for form in (Form(3, group_size=32), Form(3, asymmetric=True)):
        grid = make_grid(weight, form)
        losses.append(output_loss(weight, gptq(weight, grid, inverse, 128), grid, hessian))
    assert losses[0] < losses[1]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gptq_is_rounding_where_activations_are_uncorrelated(form: Form) -> None:
    weight = random_weight(8, 40)
    grid = make_grid(weight, form)
    inverse = invert_hessian(torch.eye(40, dtype=torch.float64), 0.01)
    assert torch.equal(gptq(weight, grid, inverse, 16), round_to_nearest(weight, grid))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_dead_channels_neither_cause_nor_receive_error(scale: float) -> None:
    """At any unit of the Hessian, for a dead channel's diagonal has none of its own."""
    hessian, weight = correlated_hessian(40, 160, 2) * scale, random_weight(9, 40)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[0, 3, 17, 39]] = True
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    grid = make_grid(weight, PLAIN)
    inverse = invert_hessian(hessian, 0.01)
    codes = gptq(weight, grid, inverse, 16)
    assert inverse.damping == 0.01
    assert torch.equal(codes[:, dead], round_to_nearest(weight, grid)[:, dead])
    alive = invert_hessian(hessian[~dead][:, ~dead], 0.01)
    # The same matrix, factorised in two sizes: the last digits times a condition below 1e4.
    assert torch.allclose(inverse.factor[:36, :36], alive.factor, rtol=1e-10, atol=1e-10)
    assert torch.equal(codes[:, ~dead], gptq(weight[:, ~dead], grid, alive, 16))


def test_padding_keeps_the_code_that_stands_for_0() -> None:
    hessian, weight = correlated_hessian(64, 300, 5), random_weight(9, 64)
    hessian[40:], hessian[:, 40:], weight[:, 40:] = 0.0, 0.0, 0.0
    grid = make_grid(weight, Form(3, 32, asymmetric=True))
    codes = gptq(weight, grid, invert_hessian(hessian, 0.01), 16)
    assert not grid.dequantize(codes)[:, 40:].any()
    assert grid.dequantize(codes)[:, :40].any()


@pytest.mark.parametrize("scale", [1e-12, 2.0**-60, 1e12])
@pytest.mark.parametrize("form", FORMS[:4], ids=str)
def test_the_unit_of_the_hessian_does_not_matter(form: Form, scale: float) -> None:
    hessian, weight = correlated_hessian(50, 200, 6), random_weight(7, 50)
    grid = make_grid(weight, form)
    expected = gptq(weight, grid, invert_hessian(hessian, 0.01), 16)
    inverse = invert_hessian(hessian * scale, 0.01)
    assert inverse.damping == 0.01
    assert torch.equal(gptq(weight, grid, inverse, 16), expected)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_copies_of_a_channel_make_up_for_each_other(form: Form) -> None:
    """Reconstruction repeats channels: singular before damping, and finer than one code after."""
    index = torch.arange(32).repeat_interleave(2)
    hessian = correlated_hessian(32, 128, 7)[index][:, index]
    assert int(torch.linalg.matrix_rank(hessian)) == 32
    weight = random_weight(9, 32)[:, index]
    grid, inverse = make_grid(weight, form), invert_hessian(hessian, 0.01)
    assert inverse.damping == 0.01
    codes = gptq(weight, grid, inverse, 16)
    assert torch.equal(codes, gptq_by_column(weight, grid, inverse))
    nearest = output_loss(weight, round_to_nearest(weight, grid), grid, hessian)
    assert output_loss(weight, codes, grid, hessian) < 0.5 * nearest


def test_damping_is_raised_until_the_factorisation_succeeds_and_reported() -> None:
    hessian = torch.diag(torch.tensor([1.0, 1.0, -0.3], dtype=torch.float64))
    inverse = invert_hessian(hessian, 0.01)
    assert inverse.damping > 0.3
    assert inverse.damping == 0.01 * 2 ** round(torch.tensor(inverse.damping / 0.01).log2().item())


def test_a_singular_hessian_gets_some_damping_where_none_was_asked_for() -> None:
    inverse = invert_hessian(torch.ones(3, 3, dtype=torch.float64), 0.0)
    assert 0 < inverse.damping < 1e-3
    assert invert_hessian(torch.eye(3, dtype=torch.float64), 0.0).damping == 0


def test_a_layer_that_never_fired_is_rounded_to_nearest() -> None:
    hessian, weight = torch.zeros(8, 8, dtype=torch.float64), random_weight(3, 8)
    grid = make_grid(weight, PLAIN)
    codes = gptq(weight, grid, invert_hessian(hessian, 0.01), 4)
    assert torch.equal(codes, round_to_nearest(weight, grid))
    assert output_loss(weight, codes, grid, hessian) == 0.0


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 1)])
def test_a_hessian_with_nan_or_infinity_is_refused(poison: float, place: tuple[int, int]) -> None:
    hessian = correlated_hessian(4, 16, 8)
    hessian[place] = poison
    with pytest.raises(NotPositiveDefiniteError, match="NaN or infinity"):
        invert_hessian(hessian, 0.01)


def test_a_hessian_that_is_none_is_refused() -> None:
    for diagonal in ([-1.0, -1.0], [1.0, -1.0], [1e3, -9.99e2]):
        with pytest.raises(NotPositiveDefiniteError):
            invert_hessian(torch.diag(torch.tensor(diagonal, dtype=torch.float64)), 0.01)

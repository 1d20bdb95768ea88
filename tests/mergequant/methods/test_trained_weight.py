"""The trainable weight: where it begins, what it may change, what it multiplies by."""

import pytest
import torch
from torch import Tensor

from mergequant.methods.gptq import gptq, gptq_working_weight, invert_hessian
from mergequant.methods.trained_weight import (
    ElementwiseWeight,
    LowRankWeight,
    straight_through,
    trainable_elements,
)
from tests.forms import Form, make_grid

FORMS = [
    Form(),
    Form(3, 32, asymmetric=True, search="mse"),
    Form(8, asymmetric=True),
    Form(4, segments=(32, 32, 16)),
]


def _weight(out: int = 24, columns: int = 80) -> Tensor:
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(1)).to(torch.float64)
    weight *= torch.logspace(-1, 1, columns, dtype=torch.float64)
    weight[3] = 0  # a head padded with zeros
    weight[:, -5:] = 0  # columns of padding
    weight[7, 32:64] = 0  # a group of zeros
    return weight


def _low_rank(weight: Tensor, form: Form, rank: int = 4) -> LowRankWeight:
    grid = make_grid(weight, form)
    generator = torch.Generator().manual_seed(0)
    return LowRankWeight(weight, trainable_elements(weight, grid), grid, rank, generator)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_training_begins_at_the_codes_of_gptq(form: Form) -> None:
    weight = _weight()
    x = torch.randn(400, 80, generator=torch.Generator().manual_seed(2)).to(torch.float64)
    x = x + x.roll(1, dims=1)
    inverse = invert_hessian(x.T @ x, 0.01)
    grid = make_grid(weight, form)
    codes = gptq(weight, grid, inverse, 16)
    working = gptq_working_weight(weight, grid, inverse, 16)
    assert torch.equal(grid.round_weight(working), codes)
    assert not torch.equal(grid.round_weight(weight), codes)
    trained = LowRankWeight(
        working, trainable_elements(weight, grid), grid, 4, torch.Generator().manual_seed(0)
    )
    differ = trained.codes() != codes  # float32 moves what lies within 2^-20 of a border
    scaled = (working / grid.columns(torch.arange(80))[0])[differ]
    assert bool(((scaled - scaled.floor() - 0.5).abs() < 2.0**-20 * 2**form.bits).all())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_zeros_stay_zeros_however_it_is_trained(form: Form) -> None:
    weight = _weight()
    trained = _low_rank(weight, form)
    with torch.no_grad():
        trained.b.normal_(generator=torch.Generator().manual_seed(3))
    moved = trained.merged() != weight.to(torch.float32)
    assert not bool(moved[3].any()) and not bool(moved[:, -5:].any())
    if form.group_size is not None or form.segments is not None:
        assert not bool(moved[7, 32:64].any())
    assert bool(moved[0].any())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_trained_weight_is_what_its_codes_stand_for(form: Form) -> None:
    weight = _weight()
    trained = _low_rank(weight, form)
    with torch.no_grad():
        trained.b.normal_(generator=torch.Generator().manual_seed(3))
    grid = make_grid(weight, form)
    stands_for = grid.dequantize(trained.codes())
    assert torch.equal(trained.codes(), grid.round_weight(trained.merged().to(torch.float64)))
    # One subtraction of integers, exact, and one product: a rounding of float32.
    assert torch.allclose(trained().to(torch.float64), stands_for, rtol=2.0**-23, atol=0.0)


def test_gradients_pass_the_rounding_and_stop_where_codes_saturate() -> None:
    x = torch.tensor([0.3, -0.4, 9.0, 2.6], requires_grad=True)
    y = straight_through(x.detach().round().clamp(-8, 7), x.clamp(-8, 7))
    y.sum().backward()
    assert torch.equal(y.detach(), torch.tensor([0.0, 0.0, 7.0, 3.0]))
    assert torch.equal(x.grad, torch.tensor([1.0, 1.0, 0.0, 1.0]))


def test_the_gradient_of_a_and_b_is_that_of_the_relaxed_product() -> None:
    weight = _weight()
    trained = _low_rank(weight, Form())
    with torch.no_grad():
        trained.b.normal_(std=0.01, generator=torch.Generator().manual_seed(3))
    x = torch.randn(10, 80, generator=torch.Generator().manual_seed(4))
    (x @ trained().T).square().sum().backward()
    wanted = 2 * (x @ trained().detach().T).T @ x  # gradient to the weight, straight through
    scaled = trained.merged().detach() / trained.step
    towards = wanted * ((scaled >= -8) & (scaled <= 7)) * trained.step * trained.trainable
    expected = trained.a.detach().T @ towards
    # Sums of 80 and 24 float32 products in another order.
    assert torch.allclose(
        trained.b.grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_each_element_is_trained_by_itself(form: Form) -> None:
    weight = _weight()
    grid = make_grid(weight, form)
    trained = ElementwiseWeight(weight, trainable_elements(weight, grid), grid)
    before = trained.codes()
    assert torch.equal(before, grid.round_weight(weight))
    with torch.no_grad():
        trained.d[0, 1] -= 1.0  # a weight step
        trained.d[3] -= 1.0  # a row of zeros
        trained.d[:, -5:] -= 1.0  # columns of zeros
    expected = before.clone()
    expected[0, 1] = (before[0, 1] - 1).clamp(min=-(2 ** (form.bits - 1)))
    assert torch.equal(trained.codes(), expected)


def test_the_gradient_of_an_element_is_that_of_its_weight() -> None:
    weight = _weight()
    grid = make_grid(weight, Form())
    trained = ElementwiseWeight(weight, trainable_elements(weight, grid), grid)
    x = torch.randn(10, 80, generator=torch.Generator().manual_seed(4))
    (x @ trained().T).square().sum().backward()
    wanted = 2 * (x @ trained().detach().T).T @ x  # gradient to the weight, straight through
    scaled = trained.merged().detach() / trained.step
    expected = wanted * ((scaled >= -8) & (scaled <= 7)) * trained.step * trained.trainable
    # Sums of 10 float32 products in another order.
    close = {"rtol": 1e-4, "atol": 1e-5 * float(expected.abs().max())}
    assert torch.allclose(trained.d.grad, expected, **close)

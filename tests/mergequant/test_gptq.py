"""GPTQ: the blocked form equals the column-by-column definition, on correlated data."""

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
from mergequant.methods.migrate import weight_steps


def correlated_hessian(columns: int, tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    return 2 * x.T @ x / tokens


def random_weight(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("columns", [1, 7, 127, 128, 129, 172])
@pytest.mark.parametrize("block", [1, 16, 128])
def test_blocks_do_not_change_the_codes(columns: int, block: int) -> None:
    hessian = correlated_hessian(columns, 4 * columns, columns)
    weight = random_weight(11, columns)
    step = weight_steps(weight, 4)
    inverse = invert_hessian(hessian, 0.01)
    expected = gptq_by_column(weight, step, inverse, 4)
    assert torch.equal(gptq(weight, step, inverse, 4, block), expected)


def test_gptq_beats_rounding_on_correlated_activations() -> None:
    hessian = correlated_hessian(96, 400, 1)
    weight = random_weight(32, 96)
    step = weight_steps(weight, 4)
    codes = gptq(weight, step, invert_hessian(hessian, 0.01), 4, 32)
    nearest = output_loss(weight, round_to_nearest(weight, step, 4), step, hessian)
    assert output_loss(weight, codes, step, hessian) < 0.7 * nearest


def test_gptq_is_rounding_where_activations_are_uncorrelated() -> None:
    weight = random_weight(8, 40)
    step = weight_steps(weight, 4)
    inverse = invert_hessian(torch.eye(40, dtype=torch.float64), 0.01)
    assert torch.equal(gptq(weight, step, inverse, 4, 16), round_to_nearest(weight, step, 4))


def test_dead_and_repeated_channels_are_handled() -> None:
    hessian = correlated_hessian(16, 64, 2)
    hessian[3] = hessian[:, 3] = 0.0  # never fired
    hessian[5], hessian[:, 5] = hessian[4], hessian[:, 4]  # a copy: singular without damping
    hessian[5, 5] = hessian[4, 4]
    weight = random_weight(4, 16)
    step = weight_steps(weight, 4)
    inverse = invert_hessian(hessian, 0.01)
    codes = gptq(weight, step, inverse, 4, 128)
    assert torch.equal(codes[:, 3], round_to_nearest(weight, step, 4)[:, 3])


def test_damping_is_raised_until_the_factorisation_succeeds_and_reported() -> None:
    hessian = torch.diag(torch.tensor([1.0, 1.0, -0.3], dtype=torch.float64))
    inverse = invert_hessian(hessian, 0.01)
    assert inverse.damping > 0.3
    assert inverse.damping == 0.01 * 2 ** round(torch.tensor(inverse.damping / 0.01).log2().item())


def test_a_hessian_with_nan_is_refused() -> None:
    hessian = torch.full((4, 4), torch.nan, dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError):
        invert_hessian(hessian, 0.01)

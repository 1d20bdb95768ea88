"""What rounding is estimated to cost, and which widths are chosen for a budget."""

import itertools
from dataclasses import replace

import pytest
import torch

from mergequant.methods.sensitivity import (
    Sensitivity,
    average_bits,
    input_damage,
    upgraded,
    weight_damage,
)


def linear(number: int, inputs: float, weights: float, multiplications: int = 10) -> Sensitivity:
    return Sensitivity((f"l{number}",), True, multiplications, 4, 4, inputs, weights)


LINEARS = [linear(0, 3.0, 1.0), linear(1, 0.5, 0.2), linear(2, 2.0, 5.0, 20), linear(3, 0.1, 0.1)]


def test_damage_is_half_the_sum_of_squares_of_error_times_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    x, error, by_input = (torch.randint(-3, 4, (3, 4), generator=generator) for _ in range(3))
    expected = sum(float(error[t, k] * by_input[t, k]) ** 2 for t in range(3) for k in range(4)) / 2
    assert input_damage(error.float(), by_input.float()) == expected
    lost, by_output = torch.randint(-3, 4, (2, 4), generator=generator), torch.tensor([[1, 2]] * 3)
    terms = (
        float(by_output[t, j] * sum(int(x[t, k] * lost[j, k]) for k in range(4))) ** 2
        for t in range(3)
        for j in range(2)
    )
    assert weight_damage(x.float(), lost.float(), by_output.float()) == sum(terms) / 2


def test_it_is_what_a_quadratic_loss_grows_by_on_average() -> None:
    """For a Gaussian log-likelihood, the expected squared gradient is the second derivative."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    error = torch.full_like(noise, 0.3)
    # (y - target)^2 / 2 has the gradient `noise`; moving y by e adds e^2 / 2 on average.
    growth = float(((noise + error).square() - noise.square()).mean()) / 2
    spread = 0.3 * 200_000**-0.5
    assert input_damage(error, noise) / 200_000 == pytest.approx(growth, abs=5 * spread)


@pytest.mark.parametrize("most", [4.0, 4.3, 5.0, 6.5, 8.0])
def test_the_budget_is_kept_and_nothing_that_fits_it_is_left(most: float) -> None:
    chosen = upgraded(LINEARS, most, None)
    assert average_bits(chosen) <= most * (1 + 1e-9)
    total = sum(x.multiplications for x in chosen)
    for now in chosen:
        wider = now.upgrade()
        if wider is not None:
            cost = (wider.bits - now.bits) * now.multiplications / total
            assert average_bits(chosen) + cost > most
    if most == 8.0:
        assert all((x.activation_bits, x.weight_bits) == (8, 8) for x in chosen)


def test_where_all_cost_the_same_it_is_the_best_choice_of_all() -> None:
    alike = [linear(n, damage, 0.0) for n, damage in enumerate((3.0, 0.5, 2.0, 0.1, 1.0))]
    chosen = upgraded(alike, 4.8, None)  # two of five inputs
    assert average_bits(chosen) == pytest.approx(4.8)
    best = min(
        sum(x.damage for n, x in enumerate(alike) if n not in wide)
        + sum(x.upgrade().damage for n, x in enumerate(alike) if n in wide)  # type: ignore[union-attr]
        for wide in itertools.combinations(range(5), 2)
    )
    assert sum(x.damage for x in chosen) == pytest.approx(best)


def test_it_stops_as_soon_as_the_damage_is_within_the_bound() -> None:
    chosen = upgraded(LINEARS, None, 4.0)
    assert sum(x.damage for x in chosen) <= 4.0
    bits = average_bits(chosen)
    assert 4 < bits < 8
    assert upgraded(LINEARS, None, 100.0) == LINEARS


def test_fixed_widths_stay() -> None:
    fixed = [replace(x, fixed=True) for x in LINEARS]
    assert upgraded(fixed, 8.0, None) == fixed

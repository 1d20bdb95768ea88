"""Weights fitted to their rounded input: the closed form, and when tokens held out refuse it."""

import torch
from torch import Tensor

from mergequant.methods import correct
from mergequant.methods.correct import InputMoments, best_correction

EPS = torch.finfo(torch.float64).eps


def tokens(count: int, seed: int = 0, channels: int = 12) -> tuple[Tensor, Tensor]:
    """An input of 3 directions, exact and with noise in all: float64 [count, channels]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(
        3, channels, generator=torch.Generator().manual_seed(99), dtype=torch.float64
    )
    exact = torch.randn(count, 3, generator=generator, dtype=torch.float64) @ mixing
    noise = torch.randn(count, channels, generator=generator, dtype=torch.float64)
    return exact, exact + 0.5 * noise


def moments(exact: Tensor, rounded: Tensor) -> InputMoments:
    return InputMoments(rounded.T @ rounded, (exact - rounded).T @ rounded)


def weight(out: int = 5, channels: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(out, channels, generator=generator, dtype=torch.float64)


def correction(w: Tensor, of: InputMoments, ridge: float) -> Tensor | None:
    return correct.correction(w @ of.lost.to(w), of.hessian, ridge)


def output_error(v: Tensor, w: Tensor, of: InputMoments) -> float:
    return correct.output_error(v, w @ (of.hessian + of.lost), of.hessian)


def corrected(w: Tensor, of: InputMoments, ridge: float) -> Tensor:
    added = correction(w, of, ridge)
    assert added is not None
    return w + added


def test_it_is_the_least_squares_solution_of_the_definition() -> None:
    exact, rounded = tokens(200)
    w, of = weight(), moments(exact, rounded)
    ridge = 0.01
    d = ridge * of.hessian.diagonal().mean()
    # ||U W^T - C V^T||^2 + d ||V - W||^2 as one system of equations.
    rows = torch.cat((rounded, d.sqrt() * torch.eye(12, dtype=torch.float64)))
    right = torch.cat((exact @ w.T, d.sqrt() * w.T))
    solved = torch.linalg.lstsq(rows, right).solution.T
    # The normal equations square the condition of `rows`.
    bound = 12 * EPS * float(torch.linalg.cond(rows)) ** 2 * float(solved.norm())
    assert float((corrected(w, of, ridge) - solved).norm()) < bound


def test_an_input_that_loses_nothing_corrects_nothing() -> None:
    exact, _ = tokens(200)
    assert torch.equal(corrected(weight(), moments(exact, exact), 0.01), weight())


def test_the_error_is_that_of_the_outputs() -> None:
    exact, rounded = tokens(200)
    w, other = weight(), weight() + 0.1

    def error(v: Tensor) -> float:
        return float((exact @ w.T - rounded @ v.T).square().sum())

    of = moments(exact, rounded)
    difference = output_error(other, w, of) - output_error(w, w, of)
    terms = error(w) + error(other) + float((exact @ w.T).square().sum())
    assert abs(difference - (error(other) - error(w))) < 200 * 12 * EPS * terms


def test_tokens_held_out_ask_for_it_where_there_are_enough_to_fit() -> None:
    w = weight()
    fitted, held_out = moments(*tokens(2000)), moments(*tokens(500, seed=1))
    added = best_correction(w, fitted, held_out, (0.003, 0.03))
    assert added is not None
    errors = {
        ridge: output_error(corrected(w, fitted, ridge), w, held_out) for ridge in (0.003, 0.03)
    }
    best = min(errors, key=errors.__getitem__)
    assert errors[best] < output_error(w, w, held_out)
    # Made in float32: the solution's error grows with the condition of what is solved.
    single = torch.finfo(torch.float32).eps
    exact = correction(w, fitted, best)
    assert exact is not None
    damped = fitted.hessian + best * fitted.hessian.diagonal().mean() * torch.eye(12)
    bound = 12 * single * float(torch.linalg.cond(damped)) * float(exact.norm())
    assert float((added - exact).norm()) < bound


def test_tokens_held_out_refuse_what_fits_noise() -> None:
    generator = torch.Generator().manual_seed(3)
    exact = torch.randn(600, 12, generator=generator, dtype=torch.float64)
    # Errors that have nothing to do with the input, of which there are as many as channels.
    rounded = exact + 0.05 * torch.randn(600, 12, generator=generator, dtype=torch.float64)
    few, many = moments(exact[:13], rounded[:13]), moments(exact[13:], rounded[13:])
    assert best_correction(weight(), few, many, ridges=(1e-6,)) is None


def test_a_singular_input_leaves_the_weight() -> None:
    nothing = InputMoments(torch.zeros(12, 12), torch.zeros(12, 12))
    assert correction(weight(), nothing, 0.01) is None
    assert best_correction(weight(), nothing, nothing) is None

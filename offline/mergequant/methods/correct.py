"""Correction of a weight for what rounding its input takes away (GPTAQ, Li et al., 2025; Qronos).

The server multiplies rounded inputs C where the model has inputs U. GPTQ takes W for the best
weight of C; the best one is

    V = argmin ||U W^T - C V^T||^2 + d ||V - W||^2 = W + W D (H + d I)^-1,
    H = C^T C, D = (U - C)^T C.

Rounding adds noise of the same size in every direction, also where the input has next to none: V
multiplies less by those. It is a regression, and with few tokens it fits their noise. D is not
counted, therefore, but told from H and from what rounding does to each channel by itself, as if the
input were Gaussian, as a rotation nearly makes it. Tokens held out choose d, or that W stays.
"""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

RIDGES = (0.003, 0.03, 0.3)
_LARGEST_REST = 1.0


class InputMoments(NamedTuple):
    """H and D of the definition, [K, K], up to a factor that both have."""

    hessian: Tensor
    lost: Tensor

    def to(self, dtype: torch.dtype) -> "InputMoments":
        """Both in `dtype`."""
        return InputMoments(self.hessian.to(dtype), self.lost.to(dtype))


class RoundedChannels(NamedTuple):
    """What rounding does to each channel by itself, over `tokens` tokens: float64 [K] each.

    Attributes:
        mean: of C.
        variance: of C.
        lost_mean: of what rounding takes away, U - C.
        lost_covariance: of that with C.
        lost_variance: of that.
    """

    tokens: int
    mean: Tensor
    variance: Tensor
    lost_mean: Tensor
    lost_covariance: Tensor
    lost_variance: Tensor


def gaussian_lost(products: Tensor, rounded: RoundedChannels) -> Tensor:
    """D of a Gaussian input, of which only H was counted (Bussgang, 1952).

    A rounded channel C_k of it is g_k U_k, with g_k = cov(U_k, C_k) / var(U_k), and a rest that no
    channel of U is correlated with. As far as the rests of two channels are not correlated either,

        cov(U_j, C_k) = g_k cov(U_j, U_k) = cov(C_j, C_k) / g_j    where j is not k.

    On norm-fed inputs of SmolLM2-135M, and on down's, V of this D loses less on other tokens than V
    of a D counted on 28,672 of them, which takes as many products as H twice over.

    Args:
        products: C^T C, [K, K].
        rounded: of the same tokens.

    Returns:
        (U - C)^T C: float64 [K, K].
    """
    both = rounded.variance + rounded.lost_covariance  # of U with C
    exact = both + rounded.lost_covariance + rounded.lost_variance  # of U
    # 1 / g - 1; a channel that is nearly all clipped away says nothing of others.
    rest = ((exact - both) / both.clamp(min=1e-300)).clamp(-_LARGEST_REST, _LARGEST_REST)
    rest = torch.where(both > 0, rest, 0.0)
    means = torch.outer(rounded.mean, rounded.mean) * rounded.tokens
    lost = (products.to(torch.float64) - means) * rest[:, None]
    lost.diagonal().copy_(rounded.lost_covariance * rounded.tokens)
    return lost + torch.outer(rounded.lost_mean, rounded.mean) * rounded.tokens


def correction(wanted: Tensor, hessian: Tensor, ridge: float) -> Tensor | None:
    """V - W of the definition, with d = `ridge` times the mean diagonal of H.

    Args:
        wanted: W D, [out, K].
        hessian: H, [K, K].

    Returns:
        [out, K], in the dtype of `wanted`; None where H + d I has no Cholesky factor.
    """
    damped = hessian.to(wanted, copy=True)
    damped.diagonal().add_(ridge * damped.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    return torch.cholesky_solve(wanted.T, lower).T if int(failed) == 0 else None


def output_error(weight: Tensor, target: Tensor, hessian: Tensor) -> float:
    """||U W^T - C V^T||^2, less what does not depend on V: tr(V H V^T) - 2 tr(W (H + D) V^T).

    Args:
        weight: V, [out, K].
        target: W (H + D), [out, K]; H + D is U^T C.
        hessian: H, [K, K].
    """
    return float(((weight @ hessian - 2 * target) * weight).sum(dtype=torch.float64))


def best_correction(
    weight: Tensor,
    fitted: InputMoments,
    held_out: InputMoments,
    ridges: Sequence[float] = RIDGES,
) -> Tensor | None:
    """V - W with the ridge of least error on tokens held out; None: W serves them best.

    Args:
        weight: [out, K], the readers of the input stacked.
        fitted: of the tokens that V is fitted to.
        held_out: of the others.

    Returns:
        float32 [out, K].
    """
    single = weight.to(torch.float32)
    fitted, held_out = fitted.to(torch.float32), held_out.to(torch.float32)
    wanted = single @ fitted.lost
    target = single @ (held_out.hessian + held_out.lost)
    best, least = None, output_error(single, target, held_out.hessian)
    for ridge in ridges:
        added = correction(wanted, fitted.hessian, ridge)
        error = inf if added is None else output_error(single + added, target, held_out.hessian)
        if error < least:
            best, least = added, error
    return best

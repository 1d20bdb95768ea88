"""Correction of a weight for what rounding its input takes away (GPTAQ, Li et al., 2025; Qronos).

The server multiplies rounded inputs C where the model has inputs U. GPTQ takes W for the best
weight of C; the best one is

    V = argmin ||U W^T - C V^T||^2 + d ||V - W||^2 = W + W D (H + d I)^-1,
    H = C^T C, D = (U - C)^T C.

Rounding adds noise of the same size in every direction, also where the input has next to none: V
multiplies less by those. It is a regression, and with few tokens it fits their noise: tokens that
were held out choose d, or that W stays.
"""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

RIDGES = (0.003, 0.03, 0.3)


class InputMoments(NamedTuple):
    """H and D of the definition, [K, K], up to a factor that both have."""

    hessian: Tensor
    lost: Tensor

    def to(self, dtype: torch.dtype) -> "InputMoments":
        """Both in `dtype`."""
        return InputMoments(self.hessian.to(dtype), self.lost.to(dtype))


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

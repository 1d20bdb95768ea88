"""GPTQ (paper 5 and B; Frantar et al., 2022): codes column by column, errors carried onward.

Per output channel, symmetric. The order is static act-order: columns by falling Hessian diagonal,
a permutation that is undone at the end and leaves nothing behind in the checkpoint.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant_vllm.rounding import round_to_codes

_LARGEST_DAMPING = 1e3


class NotPositiveDefiniteError(ValueError):
    """A Hessian that no damping makes invertible: it holds NaN or infinity."""


@dataclass(frozen=True)
class InverseHessian:
    """What GPTQ needs of a Hessian; shared by linears that read the same activations.

    Attributes:
        order: int64 [n], column handled at each turn.
        factor: [n, n], upper Cholesky factor of the inverse of the damped, permuted Hessian.
        damping: the fraction of the mean diagonal that was added.
    """

    order: Tensor
    factor: Tensor
    damping: float


def invert_hessian(hessian: Tensor, damping: float) -> InverseHessian:
    """Order, damp and invert; damping is doubled until the factorisation succeeds.

    Args:
        hessian: [n, n], 2/t X^T X of the activations that the kernel will see. A channel that
            never fired has a zero row; it is given a diagonal of 1 and receives no error.
        damping: fraction of the mean diagonal.

    Raises:
        NotPositiveDefiniteError: no damping helps.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    permuted = hessian[order][:, order].clone()
    dead = permuted.diagonal() == 0
    permuted.diagonal()[dead] = 1.0
    mean = permuted.diagonal().mean()
    while damping < _LARGEST_DAMPING:
        damped = permuted.clone()
        damped.diagonal().add_(damping * mean)
        factor = _upper_factor_of_inverse(damped)
        if factor is not None:
            return InverseHessian(order=order, factor=factor, damping=damping)
        damping *= 2
    raise NotPositiveDefiniteError("no damping makes the Hessian positive definite")


def _upper_factor_of_inverse(matrix: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) != 0:
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    finite = bool(torch.isfinite(upper).all())
    return upper if int(failed) == 0 and finite else None


def gptq(weight: Tensor, step: Tensor, inverse: InverseHessian, bits: int, block: int) -> Tensor:
    """Codes of a weight, in blocks of columns.

    Args:
        weight: [out, n], migrated.
        step: [out], weight steps.
        block: columns whose errors reach the rest at once.

    Returns:
        int8 [out, n].
    """
    w = weight[:, inverse.order].clone()
    u = inverse.factor
    codes = torch.zeros_like(w)
    columns = w.shape[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros_like(w[:, start:stop])
        for k in range(start, stop):
            codes[:, k] = round_to_codes(w[:, k] / step, bits)
            error = (w[:, k] - codes[:, k] * step) / u[k, k]
            w[:, k:stop] -= error[:, None] * u[k, k:stop]
            errors[:, k - start] = error
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return _restore(codes, inverse.order)


def gptq_by_column(weight: Tensor, step: Tensor, inverse: InverseHessian, bits: int) -> Tensor:
    """The definition: each column's error goes to all later ones at once. Same codes, slower."""
    w = weight[:, inverse.order].clone()
    u = inverse.factor
    codes = torch.zeros_like(w)
    for k in range(w.shape[1]):
        codes[:, k] = round_to_codes(w[:, k] / step, bits)
        error = (w[:, k] - codes[:, k] * step) / u[k, k]
        w[:, k + 1 :] -= torch.outer(error, u[k, k + 1 :])
    return _restore(codes, inverse.order)


def _restore(codes: Tensor, order: Tensor) -> Tensor:
    restored = torch.empty_like(codes, dtype=torch.int8)
    restored[:, order] = codes.to(torch.int8)
    return restored


def round_to_nearest(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """Codes without error feedback: [out, n] and [out] to int8 [out, n]."""
    return round_to_codes(weight / step[:, None], bits).to(torch.int8)


def output_loss(weight: Tensor, codes: Tensor, step: Tensor, hessian: Tensor) -> float:
    """Relative squared error at the layer's output, tr(E H E^T) / tr(W H W^T)."""
    error = weight - codes.to(weight.dtype) * step[:, None]
    energy = ((weight @ hessian) * weight).sum()
    return float(((error @ hessian) * error).sum() / energy) if float(energy) > 0 else 0.0

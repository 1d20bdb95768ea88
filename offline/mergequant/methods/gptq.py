"""GPTQ (paper 5 and B; Frantar et al., 2022): codes column by column, errors carried onward.

The order is static act-order: columns by falling Hessian diagonal, a permutation that is undone at
the end and leaves nothing behind in the checkpoint. Steps and zero points are fixed beforehand; a
column keeps those of its own group, whenever its turn comes.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mergequant_vllm.rounding import round_to_codes

_LARGEST_DAMPING = 1e3
_FIRST_DAMPING = 1e-6  # tried second where none was asked for


class NotPositiveDefiniteError(ValueError):
    """A Hessian that no damping makes invertible, or that holds NaN or infinity."""


class Grid(Protocol):
    """The values a weight can be rounded to, step * (code - zero point); see `weights`."""

    @property
    def bits(self) -> int:
        """Width of a code."""

    def columns(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Step and zero point of the columns `numbers`, int64 [m]: each [out, m]."""

    def round_weight(self, weight: Tensor) -> Tensor:
        """Nearest codes of [out, n]: int8 [out, n]."""

    def dequantize(self, codes: Tensor) -> Tensor:
        """The weight [out, n] that codes stand for."""


@dataclass(frozen=True)
class InverseHessian:
    """What GPTQ needs of a Hessian; shared by linears that read the same activations.

    Attributes:
        order: int64 [n], column handled at each turn.
        factor: [n, n], upper Cholesky factor of the inverse of the damped, permuted Hessian, in
            units of its mean diagonal. GPTQ is indifferent to the unit.
        damping: the fraction of the mean diagonal that was added.
    """

    order: Tensor
    factor: Tensor
    damping: float


def invert_hessian(hessian: Tensor, damping: float) -> InverseHessian:
    """Order, damp and invert; damping is doubled until the factorisation succeeds.

    Args:
        hessian: [n, n], 2/t X^T X of the activations that the kernel will see. A channel that
            never fired has a diagonal of 0; it neither causes nor receives error. Repeated
            channels (paper 4.2) make it singular until it is damped.
        damping: fraction of the mean diagonal of the channels that fired.

    Raises:
        NotPositiveDefiniteError: no damping helps.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise NotPositiveDefiniteError("the Hessian holds NaN or infinity")
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    scaled = _in_units_of_the_mean(hessian[order][:, order])
    while damping < _LARGEST_DAMPING:
        damped = scaled.clone()
        damped.diagonal().add_(damping)
        factor = _upper_factor_of_inverse(damped)
        if factor is not None:
            return InverseHessian(order=order, factor=factor, damping=damping)
        damping = max(2 * damping, _FIRST_DAMPING)
    raise NotPositiveDefiniteError("no damping makes the Hessian positive definite")


def _in_units_of_the_mean(hessian: Tensor) -> Tensor:
    """Divided by the mean diagonal of live channels; dead ones have rows of the unit matrix."""
    dead = hessian.diagonal() == 0
    live = hessian.diagonal()[~dead]
    mean = live.mean() if len(live) else hessian.new_tensor(1.0)
    if float(mean) <= 0:
        raise NotPositiveDefiniteError("the Hessian's diagonal is negative")
    scaled = hessian / mean
    scaled[dead] = 0.0
    scaled[:, dead] = 0.0
    scaled.diagonal()[dead] = 1.0
    return scaled


def _upper_factor_of_inverse(matrix: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) != 0:
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    finite = bool(torch.isfinite(upper).all())
    return upper if int(failed) == 0 and finite else None


def gptq(weight: Tensor, grid: Grid, inverse: InverseHessian, block: int) -> Tensor:
    """Codes of a weight: [out, n] to int8 [out, n]; see `gptq_working_weight`."""
    return grid.round_weight(gptq_working_weight(weight, grid, inverse, block))


def gptq_working_weight(weight: Tensor, grid: Grid, inverse: InverseHessian, block: int) -> Tensor:
    """Each column as it was when its turn came: its nearest codes are GPTQ's codes.

    Args:
        weight: [out, n], migrated; the dtype of the Hessian.
        grid: steps and zero points, of the whole weight.
        block: columns whose errors reach the rest at once.

    Returns:
        [out, n]: the weight plus what earlier columns' errors added to it.
    """
    # Transposed: what is read and written at each turn, a column of W, is contiguous.
    w = weight.T.index_select(0, inverse.order)
    u = inverse.factor
    diagonal = u.diagonal().tolist()
    for start in range(0, len(w), block):
        stop = min(start + block, len(w))
        step, zero = (x.T.contiguous() for x in grid.columns(inverse.order[start:stop]))
        shifted = bool(zero.any())  # without zero points, two operations fewer for each column
        errors = torch.empty_like(w[start:stop])
        for k in range(start, stop):
            i = k - start
            scaled = w[k] / step[i]
            code = round_to_codes(scaled + zero[i] if shifted else scaled, grid.bits)
            rounded = (code - zero[i] if shifted else code) * step[i]
            torch.sub(w[k], rounded, out=errors[i]).div_(diagonal[k])
            w[k + 1 : stop].addr_(u[k, k + 1 : stop], errors[i], alpha=-1)
        w[stop:].addmm_(u[start:stop, stop:].T, errors, alpha=-1)
    return _restore(w.T, inverse.order)


def gptq_by_column(weight: Tensor, grid: Grid, inverse: InverseHessian) -> Tensor:
    """The definition: each column's error goes to all later ones at once. Same codes, slower."""
    w = weight[:, inverse.order].clone()
    u = inverse.factor
    step, zero = grid.columns(inverse.order)
    codes = torch.zeros_like(w)
    for k in range(w.shape[1]):
        codes[:, k] = round_to_codes(w[:, k] / step[:, k] + zero[:, k], grid.bits)
        error = (w[:, k] - (codes[:, k] - zero[:, k]) * step[:, k]) / u[k, k]
        w[:, k + 1 :] -= torch.outer(error, u[k, k + 1 :])
    return _restore(codes, inverse.order).to(torch.int8)


def _restore(columns: Tensor, order: Tensor) -> Tensor:
    restored = torch.empty_like(columns, memory_format=torch.contiguous_format)
    restored[:, order] = columns
    return restored


def round_to_nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Codes without error feedback: [out, n] to int8 [out, n]."""
    return grid.round_weight(weight)


def output_loss(
    weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, energy: float | None = None
) -> float:
    """Relative squared error at the layer's output, tr(E H E^T) / tr(W H W^T).

    Args:
        energy: tr(W H W^T) where it is known, see `output_energy`.
    """
    error = weight - grid.dequantize(codes)
    energy = output_energy(weight, hessian) if energy is None else energy
    return output_energy(error, hessian) / energy if energy > 0 else 0.0


def output_energy(weight: Tensor, hessian: Tensor) -> float:
    """tr(W H W^T), twice the mean square of the layer's output summed over its channels.

    In float32, which is what a report needs, and half the time of float64.
    """
    single = weight.to(torch.float32)
    product = single @ hessian.to(torch.float32)
    return float((product * single).sum(dtype=torch.float64))

"""Accumulators over calibration tokens; each adds batches and can be read at any time."""

import torch
from torch import Tensor


class ChannelMagnitudes:
    """How large each channel gets: its lowest and highest value, its largest magnitude, energy."""

    def __init__(self) -> None:
        self._lowest: Tensor | None = None
        self._highest: Tensor | None = None
        self._energy: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Count tokens [t, n]."""
        lowest, highest = x.amin(dim=0), x.amax(dim=0)
        energy = x.square().sum(dim=0, dtype=torch.float64)
        if self._lowest is not None and self._highest is not None and self._energy is not None:
            lowest = torch.minimum(self._lowest, lowest)
            highest = torch.maximum(self._highest, highest)
            energy = self._energy + energy
        self._lowest, self._highest, self._energy = lowest, highest, energy

    @property
    def lowest(self) -> Tensor:
        """min_t X_tk: float32 [n]; at least one batch must have been added."""
        return _added(self._lowest)

    @property
    def highest(self) -> Tensor:
        """max_t X_tk: float32 [n]; at least one batch must have been added."""
        return _added(self._highest)

    @property
    def largest(self) -> Tensor:
        """max_t |X_tk|: float32 [n]; at least one batch must have been added."""
        return torch.maximum(self.highest, -self.lowest)

    @property
    def energy(self) -> Tensor:
        """sum_t X_tk^2, the diagonal of X^T X: float64 [n]."""
        return _added(self._energy)


class Hessian:
    """H = 2/t X^T X (GPTQ): [n, n], float64 sums of float32 products of a batch."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        """Count tokens [t, n]."""
        product = (x.T @ x).to(torch.float64)
        self._sum = product if self._sum is None else self._sum.add_(product)
        self._tokens += x.shape[0]

    def get(self) -> Tensor:
        """float64 [n, n]."""
        return _added(self._sum) * (2.0 / self._tokens)


def _added(value: Tensor | None) -> Tensor:
    if value is None:
        raise RuntimeError("no calibration batch was added")
    return value

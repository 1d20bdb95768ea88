"""Accumulators over calibration tokens; each adds batches and can be read at any time."""

import torch
from torch import Tensor


class LargestMagnitude:
    """max_t |X_tk| of each channel: float32 [n]."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Count tokens [t, n]."""
        largest = x.abs().amax(dim=0)
        self.value = largest if self.value is None else torch.maximum(self.value, largest)

    def get(self) -> Tensor:
        """[n]; at least one batch must have been added."""
        if self.value is None:
            raise RuntimeError("no calibration batch was added")
        return self.value


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
        if self._sum is None:
            raise RuntimeError("no calibration batch was added")
        return self._sum * (2.0 / self._tokens)

"""Accumulators over calibration tokens; each adds batches and can be read at any time."""

from collections.abc import Iterable

import torch
from torch import Tensor

_HELD_OUT = 8  # one token in so many
# A product with its own transpose is made in so many strips, none narrower than this.
_PARTS, _LEAST_COLUMNS = 6, 128


class ChannelMagnitudes:
    """How large each channel gets: its lowest and highest value, its largest magnitude, energy."""

    def __init__(self) -> None:
        self._lowest: Tensor | None = None
        self._highest: Tensor | None = None
        self._energy: Tensor | None = None

    @classmethod
    def of(cls, inputs: Iterable[Tensor]) -> "ChannelMagnitudes":
        """Those of tokens [t, n] each."""
        magnitudes = cls()
        for x in inputs:
            magnitudes.add(x)
        return magnitudes

    def add(self, x: Tensor) -> None:
        """Count tokens [t, n]."""
        lowest, highest = x.amin(dim=0), x.amax(dim=0)
        energy = x.square().sum(dim=0).to(torch.float64)
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


def outlier_ratio(sizes: Tensor) -> float | None:
    """How far the largest channel stands out: its size over the median of those that are not 0.

    Args:
        sizes: [n], not negative.

    Returns:
        1 where all are alike; None where all are 0.
    """
    alive = sizes[sizes > 0].to(torch.float64)
    return float(alive.max() / alive.median()) if len(alive) else None


def symmetric_product(x: Tensor) -> Tensor:
    """C^T C of C [t, K]: [K, K]. What lies below the diagonal is copied, not computed."""
    columns = x.shape[1]
    size = max(_LEAST_COLUMNS, -(-columns // _PARTS))
    product = x.new_empty(columns, columns)
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        product[start:stop, start:] = x[:, start:stop].T @ x[:, start:]
        product[stop:, start:stop] = product[start:stop, stop:].T
    return product


class Moments:
    """Second moments of what products read, over tokens: sums of float32 products of a batch.

    Args:
        dtype: of the sums.

    Attributes:
        tokens: how many were added.
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self._dtype = dtype
        self.tokens = 0
        self._products: Tensor | None = None
        self._lost: Tensor | None = None

    def add(self, codes: Tensor, exact: Tensor | None = None) -> None:
        """Count tokens.

        Args:
            codes: [t, K], what the products read, C.
            exact: [t, K], the same before it was rounded, U; None: `lost` is not asked for.
        """
        self._products = self._sum(self._products, symmetric_product(codes))
        if exact is not None:
            self._lost = self._sum(self._lost, (exact - codes).T @ codes)
        self.tokens += codes.shape[0]

    @property
    def products(self) -> Tensor:
        """C^T C: [K, K]; at least one batch must have been added."""
        return _added(self._products)

    @property
    def lost(self) -> Tensor:
        """D = (U - C)^T C: [K, K]; `exact` must have been given."""
        return _added(self._lost)

    def hessian(self) -> Tensor:
        """H = 2/t C^T C (GPTQ): [K, K]."""
        return self.products * (2.0 / self.tokens)

    def _sum(self, total: Tensor | None, product: Tensor) -> Tensor:
        product = product.to(self._dtype)
        return product if total is None else total.add_(product)


class SplitMoments:
    """Moments of the tokens that are fitted to, and of those held out: an eighth of each batch."""

    def __init__(self) -> None:
        self.fitted = Moments()
        self.held_out = Moments(torch.float32)  # they only choose: half the memory

    def add(self, codes: Tensor, exact: Tensor | None = None) -> None:
        """Count tokens, see `Moments.add`; the last of the batch are held out."""
        left = len(codes) - len(codes) // _HELD_OUT
        self.fitted.add(codes[:left], None if exact is None else exact[:left])
        if left < len(codes):
            self.held_out.add(codes[left:], None if exact is None else exact[left:])


def _added(value: Tensor | None) -> Tensor:
    if value is None:
        raise RuntimeError("no calibration batch was added")
    return value

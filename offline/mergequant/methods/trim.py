"""Ends of what an asymmetric channel's codes reach: drawn in as long as the error falls.

Activations of real models are long-tailed on one side: symmetric about the middle of what was
seen, a channel's codes are spent where almost no token is. What leaves the ends is clipped.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BINS, _BINS_A_LEVEL = 1024, 16  # so many at least, and so many a code
_APART = 3  # positions of the grid, in the first look


@dataclass(frozen=True)
class ChannelHistogram:
    """How often a channel's activations fall into each of B equal bins.

    Attributes:
        counts: float32 [n, B].
        lowest: float64 [n], lower border of the first bin.
        width: float64 [n], of a bin; 0 where a channel has one value.
        centers: float64 [n, B], of the bins; kept, since each pair of ends is measured on them.
    """

    counts: Tensor
    lowest: Tensor
    width: Tensor
    centers: Tensor

    @classmethod
    def of(
        cls, inputs: Sequence[Tensor], lowest: Tensor, highest: Tensor, bits: int
    ) -> "ChannelHistogram":
        """Count tokens.

        Args:
            inputs: [t, n] each.
            lowest: [n], min X.
            highest: [n], max X.
            bits: width of the codes that the histogram is to tell apart.
        """
        bins = max(_BINS, _BINS_A_LEVEL * 2**bits)
        channels = len(lowest)
        lowest = lowest.to(torch.float64)
        width = (highest.to(torch.float64) - lowest) / bins
        scale = torch.where(width > 0, 1 / width, 0.0).to(torch.float32)
        first = torch.arange(channels, device=lowest.device) * bins
        counts = torch.zeros(channels * bins, dtype=torch.int64, device=lowest.device)
        for x in inputs:
            bin_of = ((x - lowest.to(x.dtype)) * scale).to(torch.int64).clamp_(0, bins - 1)
            counts += torch.bincount((bin_of + first).flatten(), minlength=len(counts))
        numbers = torch.arange(bins, device=lowest.device) + 0.5
        centers = lowest[:, None] + width[:, None] * numbers
        return cls(counts.reshape(channels, bins).to(torch.float32), lowest, width, centers)

    @property
    def median(self) -> Tensor:
        """float64 [n], the center of the bin that holds the middle token."""
        passed = self.counts.cumsum(dim=1)
        at = (passed < passed[:, -1:] / 2).sum(dim=1, keepdim=True)
        return self.centers.gather(1, at)[:, 0]


def rounding_error(histogram: ChannelHistogram, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Squared error of 2^bits levels from `low` to `high`, summed over the tokens: float64 [n]."""
    levels = 2**bits - 1
    step = ((high - low) / levels).to(torch.float32)[:, None]
    step = torch.where(step > 0, step, 1.0)
    scaled = (histogram.centers - low[:, None]).to(torch.float32) / step
    error = (scaled.round().clamp_(0, levels) - scaled).mul_(step).square_()
    return (error.mul_(histogram.counts)).sum(dim=1, dtype=torch.float64)


def trim_ends(histogram: ChannelHistogram, grid: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The ends of least rounding error, each drawn towards the median.

    First the pairs of every third ratio are tried, then, for each channel, the pairs around its
    best one. The error seldom has a second minimum between grid points as close as a clip's.

    Args:
        grid: [G], ascending to 1: how far from the median an end may stay.

    Returns:
        low and high: float64 [n].
    """
    last = len(grid) - 1
    search = _Search(histogram, histogram.median, grid, bits)
    best = torch.full((2, len(histogram.lowest)), last, device=histogram.lowest.device)
    least = search.error(best)
    coarse = range(last, -1, -_APART)
    for pair in itertools.product(coarse, coarse):
        tried = torch.tensor(pair, device=best.device)[:, None].expand_as(best)
        best, least = search.better(tried, best, least)
    middle = best
    near = range(-(_APART - 1), _APART)
    for move in itertools.product(near, near):
        moved = middle + torch.tensor(move, device=best.device)[:, None]
        best, least = search.better(moved.clamp(0, last), best, least)
    return search.ends(best)


@dataclass(frozen=True)
class _Search:
    """Pairs of ends of all channels, as positions in the grid: int64 [2, n]."""

    histogram: ChannelHistogram
    median: Tensor
    grid: Tensor
    bits: int

    def ends(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """low and high: float64 [n] each."""
        lowest = self.histogram.lowest
        highest = lowest + self.histogram.width * self.histogram.counts.shape[1]
        below, above = self.grid.to(lowest)[positions]
        low = self.median + (lowest - self.median) * below
        high = self.median + (highest - self.median) * above
        # A ratio of 1 leaves an end as it was seen.
        return torch.where(below == 1, lowest, low), torch.where(above == 1, highest, high)

    def error(self, positions: Tensor) -> Tensor:
        """Squared error of rounding between these ends: float64 [n]."""
        return rounding_error(self.histogram, *self.ends(positions), self.bits)

    def better(self, tried: Tensor, best: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
        """`best` and its error, or what is `tried` where that has less."""
        error = self.error(tried)
        less = error < least
        return torch.where(less, tried, best), torch.where(less, error, least)

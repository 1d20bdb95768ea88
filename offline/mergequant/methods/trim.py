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
    """The ends of least rounding error, each drawn towards the median, of all pairs.

    Args:
        grid: [G], ascending to 1: how far from the median an end may stay.

    Returns:
        low and high: float64 [n].
    """
    median = histogram.median
    lowest = histogram.lowest
    highest = lowest + histogram.width * histogram.counts.shape[1]
    low, high = lowest, highest
    least = rounding_error(histogram, low, high, bits)
    for below, above in itertools.product(grid.tolist(), grid.tolist()):
        ends = median + (lowest - median) * below, median + (highest - median) * above
        error = rounding_error(histogram, *ends, bits)
        better = error < least
        least = torch.where(better, error, least)
        low, high = torch.where(better, ends[0], low), torch.where(better, ends[1], high)
    return low, high

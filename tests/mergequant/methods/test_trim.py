"""Ends of asymmetric channels: against every pair of ends, on the tokens themselves."""

import itertools

import pytest
import torch
from torch import Tensor

from mergequant.methods.clip import clip_grid
from mergequant.methods.trim import ChannelHistogram, rounding_error, trim_ends

GRID = clip_grid(0.4, 7)


def skewed(count: int = 4000) -> Tensor:
    """Channels with a long tail on one side, on the other, on both, and none: float32 [t, 4]."""
    normal = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    tail = torch.tensor([1.0, -1.0, 0.0, 0.0])
    skew = torch.where(normal * tail > 1.5, normal * 4, normal)
    skew[:, 2] = normal[:, 2] ** 3
    skew[:, 3] = normal[:, 3].clamp(-1, 1)
    return skew


def histogram(x: Tensor, bits: int) -> ChannelHistogram:
    return ChannelHistogram.of(list(x.split(700)), x.amin(dim=0), x.amax(dim=0), bits)


def error_of_tokens(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The slow, obvious form: float64 [n]."""
    levels = 2**bits - 1
    step = (high - low) / levels
    codes = ((x.to(torch.float64) - low) / step).round().clamp(0, levels)
    return (low + codes * step - x).square().sum(dim=0)


def test_every_token_is_in_one_bin() -> None:
    x = skewed()
    counted = histogram(x, 4)
    assert torch.equal(counted.counts.sum(dim=1), torch.full((4,), float(len(x))))
    # The middle token is half a bin from the center of its bin at most.
    assert bool(((counted.median - x.median(dim=0).values).abs() <= 0.51 * counted.width).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_histogram_tells_the_error_of_the_tokens(bits: int) -> None:
    x = skewed()
    low, high = x.amin(dim=0).double() * 0.6, x.amax(dim=0).double() * 0.7
    counted = histogram(x, bits)
    exact = error_of_tokens(x, low, high, bits)
    # A token is w/2 from its center at most, which moves the root of its squared error by as much.
    slack = (counted.width / 2) * len(x) ** 0.5
    root = rounding_error(counted, low, high, bits).sqrt()
    assert bool(((root - exact.sqrt()).abs() <= slack).all())


@pytest.mark.parametrize("points", [5, 7, 13, 30])
def test_the_ends_are_those_of_least_error_of_all_pairs(points: int) -> None:
    x, bits = skewed(), 4
    grid = clip_grid(0.4, points)
    counted = histogram(x, bits)
    low, high = trim_ends(counted, grid, bits)
    chosen = error_of_tokens(x, low, high, bits)
    median, lowest, highest = counted.median, x.amin(dim=0).double(), x.amax(dim=0).double()
    tried = [
        error_of_tokens(x, median + (lowest - median) * a, median + (highest - median) * b, bits)
        for a, b in itertools.product(grid.tolist(), grid.tolist())
    ]
    best = torch.stack(tried).amin(dim=0)
    # Both errors are off by what the histogram does not tell.
    slack = (counted.width / 2) * len(x) ** 0.5
    assert bool((chosen.sqrt() <= best.sqrt() + 2 * slack).all())
    # What has no tails is left whole.
    assert torch.equal(low[3:], lowest[3:]) and bool((low[:3] > lowest[:3]).all())


def test_a_channel_of_one_value_keeps_it() -> None:
    x = torch.full((50, 1), 3.0)
    low, high = trim_ends(histogram(x, 4), GRID, 4)
    assert float(low) == float(high) == 3.0

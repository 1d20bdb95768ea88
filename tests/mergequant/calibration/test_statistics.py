"""Sums over calibration tokens, against the same of all tokens at once."""

import torch

from mergequant.calibration.statistics import Moments, RoundingSums, SplitMoments

GENERATOR = torch.Generator().manual_seed(0)
# Whole numbers: every sum is exact.
CODES = torch.randint(-8, 8, (50, 6), generator=GENERATOR).to(torch.float32)
EXACT = torch.randint(-20, 20, (50, 6), generator=GENERATOR).to(torch.float32)


def test_batches_add_up_to_the_moments_of_all_tokens() -> None:
    moments = Moments()
    for codes, exact in zip(CODES.split(7), EXACT.split(7), strict=True):
        moments.add(codes, exact)
    assert moments.tokens == 50
    assert torch.equal(moments.products, (CODES.T @ CODES).double())
    assert torch.equal(moments.lost, ((EXACT - CODES).T @ CODES).double())
    assert torch.equal(moments.hessian(), moments.products * (2.0 / 50))


def test_the_last_eighth_of_each_batch_is_held_out() -> None:
    split = SplitMoments()
    split.add(CODES[:20], EXACT[:20])
    split.add(CODES[20:27], EXACT[20:27])  # too few to hold one out
    fitted = torch.cat((CODES[:18], CODES[20:27]))
    assert (split.fitted.tokens, split.held_out.tokens) == (25, 2)
    assert torch.equal(split.fitted.products, (fitted.T @ fitted).double())
    assert torch.equal(split.held_out.products, CODES[18:20].T @ CODES[18:20])
    assert torch.equal(split.held_out.lost, (EXACT[18:20] - CODES[18:20]).T @ CODES[18:20])
    channels = split.rounding.channels()
    assert channels.tokens == 25
    assert torch.equal(channels.mean, fitted.double().mean(0))


def test_channels_are_told_by_means_and_covariances() -> None:
    sums = RoundingSums()
    for codes, exact in zip(CODES.split(7), EXACT.split(7), strict=True):
        sums.add(codes, exact)
    channels = sums.channels()
    c, lost = CODES.double(), (EXACT - CODES).double()
    both = ((c - c.mean(0)) * (lost - lost.mean(0))).mean(0)
    for given, expected, scale in (
        (channels.mean, c.mean(0), 8.0),
        (channels.variance, c.var(0, unbiased=False), 64.0),
        (channels.lost_mean, lost.mean(0), 28.0),
        (channels.lost_covariance, both, 8.0 * 28.0),
        (channels.lost_variance, lost.var(0, unbiased=False), 28.0**2),
    ):
        # The sums are exact; what is made of them rounds a few times, at the size of its terms.
        assert float((given - expected).abs().max()) < 8 * torch.finfo(torch.float64).eps * scale

"""Sums over calibration tokens, against the same of all tokens at once."""

import torch

from mergequant.calibration.statistics import Moments, SplitMoments

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

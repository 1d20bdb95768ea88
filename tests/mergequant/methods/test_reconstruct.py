"""Reconstruction: lossless by itself, and the paper's choice of channels."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mergequant.methods.reconstruct import (
    Reconstruction,
    channels_to_drop,
    fold_columns,
    reconstruct,
    threshold,
)
from mergequant_vllm.rounding import round_to_codes
from tests.mergequant.methods.reconstruction_cases import BITS, OFFSET_ROUNDING, draw, make, sizes

ROUNDING = 2.0**-53  # of float64
MODES = pytest.mark.parametrize("mode", ["prune", "pad"])


def codes(tokens: int, n: int) -> Tensor:
    return round_to_codes(3 * draw(tokens, n, seed=1), BITS)


# The paper's text, slowly.


def paper_pieces(s: float, T: float) -> list[float]:
    """'decomposed into (s - T, T). If s - T is still greater than T, (s - mT, T, ...)'.

    Greater by more than noise: of two channels the larger is at T exactly if alpha is 1.
    """
    pieces = [s]
    while pieces[0] > T * (1 + 1e-12):
        pieces = [pieces[0] - T, T, *pieces[1:]]
    return pieces


def paper_dropped(outliers: set[int], importance: list[float], M: int) -> tuple[set[int], str]:
    """Pruned channels and which of the three schemes chose them."""
    neighbours: set[int] = set()
    for outlier in outliers:
        for channel in (outlier - 1, outlier + 1):
            if channel in outliers:  # (1) outlier channels are adjacent
                continue
            if channel in neighbours:  # (2) a normal channel between two outlier channels
                continue
            if not 0 <= channel < len(importance):  # (3) beginning or end of the sequence
                continue
            neighbours.add(channel)
    N = len(neighbours)
    if N > M:
        ranked = sorted(neighbours, key=lambda k: (importance[k], k))
        return set(ranked[:M]), "N > M"
    if N == M:
        return neighbours, "N = M"
    others = set(range(len(importance))) - neighbours - outliers
    if len(others) < M - N:
        return set(), "impossible"
    ranked = sorted(others, key=lambda k: (importance[k], k))
    return neighbours | set(ranked[: M - N]), "N < M"


def test_pieces_and_dropped_channels_are_the_papers() -> None:
    cases = set()
    for seed in range(600):
        n = [1, 2, 3, 5, 12, 40][seed % 6]
        alpha = [0.0, 0.3, 1.0, 2.0][seed // 6 % 4]
        size, step = sizes(n, seed), draw(n, seed=seed).abs() + 0.1
        importance = (4 * draw(n, seed=seed)).round().abs()  # many ties
        T = statistics.fmean(size.tolist()) + alpha * statistics.pstdev(size.tolist())
        assert threshold(size, alpha) == pytest.approx(T, rel=1e-12)
        pieces = [paper_pieces(s, T) for s in size.tolist()]
        outliers = {k for k in range(n) if len(pieces[k]) > 1}
        M = sum(map(len, pieces)) - n
        assert n > M
        dropped, case = paper_dropped(outliers, importance.tolist(), M)
        cases.add(case)
        made = [reconstruct(step, size, importance, alpha, mode="pad", tile=4)]
        if case == "impossible":
            with pytest.raises(ValueError, match="raise alpha, or pad"):
                reconstruct(step, size, importance, alpha, mode="prune")
        else:
            made.append(reconstruct(step, size, importance, alpha, mode="prune"))
            assert made[1].dropped.tolist() == sorted(dropped)
            assert len(made[1].index) == n
        for result in made:
            assert (result.strong, result.copies, result.left_out) == (len(outliers), M, 0)
            for k in set(range(n)) - set(result.dropped.tolist()):
                mine = (result.index == k) & (result.share > 0)
                got = sorted((result.share[mine] * size[k]).tolist())
                assert got == pytest.approx(sorted(pieces[k]), abs=1e-12 * float(size[k]))
    assert cases == {"N > M", "N = M", "N < M", "impossible"}


@pytest.mark.parametrize(
    ("strong", "count", "dropped"),
    [
        ([2, 3], 2, [1, 4]),  # adjacent: 1 and 4 only
        ([2, 4], 3, [1, 3, 5]),  # channel 3, between two, counts once
        ([0, 7], 2, [1, 6]),  # both ends
        ([0, 7], 4, [1, 3, 5, 6]),  # neighbours, then the least important others
        ([3], 1, [4]),  # the less important neighbour
        ([0, 1, 2, 3, 4, 5, 6], 1, [7]),
        ([3], 0, []),
    ],
)
def test_who_is_dropped(strong: list[int], count: int, dropped: list[int]) -> None:
    importance = torch.tensor([9.0, 8.0, 7.0, 1.0, 5.0, 2.0, 6.0, 0.5])
    flags = torch.zeros(8, dtype=torch.bool)
    flags[strong] = True
    assert channels_to_drop(flags, importance, count).tolist() == dropped


def test_of_equally_important_neighbours_the_lower_goes_first() -> None:
    flags = torch.tensor([False, True, False, True, False])
    assert channels_to_drop(flags, torch.ones(5), 2).tolist() == [0, 2]


# Lossless but for rounding.


def product_bound(x: Tensor, step: Tensor, weight: Tensor, columns: int) -> Tensor:
    """Both sums round once a term, and a term at most six times on its way."""
    magnitude = (x.abs() * step) @ weight.abs().T
    return (len(step) + columns + 12) * ROUNDING * magnitude


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_padding_leaves_the_product_as_it_is(alpha: float) -> None:
    n, x, weight = 60, codes(20, 60), draw(9, 60)
    step = sizes(n, seed=3)
    result = reconstruct(step, step, torch.ones(n), alpha, mode="pad", tile=128)
    assert result.copies > 0 and result.padding > 0
    served = x[:, result.index] @ fold_columns(weight, step, result).T
    plain = (x * step) @ weight.T
    bound = product_bound(x, step, weight, len(result.index))
    assert bool(((served - plain).abs() <= bound).all())


def test_pruning_is_the_product_without_the_dropped_channels() -> None:
    n, x, weight, importance = 60, codes(20, 60), draw(9, 60), draw(60, seed=5).abs()
    step = sizes(n, seed=3)
    size = step * weight.norm(dim=0)  # not the step itself: shares must still be of the step
    result = reconstruct(step, size, importance, 1.0, mode="prune")
    assert result.copies == len(result.dropped) > 0
    served = x[:, result.index] @ fold_columns(weight, step, result).T
    without = weight.clone()
    without[:, result.dropped] = 0
    bound = product_bound(x, step, without, n)
    assert bool(((served - (x * step) @ without.T).abs() <= bound).all())


@MODES
@pytest.mark.parametrize("staggered", [False, True])
def test_shares_of_a_kept_channel_add_up_to_1(mode: str, staggered: bool) -> None:
    for seed in range(40):
        result = make(sizes(100, seed, 0.8), 0.5, mode=mode, staggered=staggered)
        total = torch.zeros(100, dtype=torch.float64).index_add_(0, result.index, result.share)
        pieces = torch.bincount(result.index[: 100 + result.copies], minlength=100)
        wanted = torch.ones(100, dtype=torch.float64)
        wanted[result.dropped] = 0
        assert bool(((total - wanted).abs() <= (pieces + 2) * ROUNDING).all())
        assert bool((result.share > 0).all())


@MODES
def test_after_splitting_no_piece_is_above_the_threshold(mode: str) -> None:
    size = sizes(200, 8)
    result = make(size, 2.0, mode=mode)
    assert float((size[result.index] * result.share).max()) <= threshold(size, 2.0) * (1 + 1e-9)


# Where the columns stand.


def test_padding_appends_copies_by_channel_and_then_empty_columns() -> None:
    size = torch.tensor([1.0, 6.0, 0.0, 1.0, 4.0, 0.0])  # mean 2: pieces 1, 3, 1, 1, 2, 1
    result = make(size, 0.0, tile=4)
    assert result.index.tolist() == [0, 1, 2, 3, 4, 5, 1, 1, 4, 0, 0, 0]
    third = pytest.approx(1 / 3)
    assert result.share.tolist() == [1, third, 1, 1, 0.5, 1, third, third, 0.5, 0, 0, 0]
    assert (result.strong, result.copies, result.padding) == (2, 3, 3)
    assert result.offset is None and result.dropped.tolist() == []
    folded = fold_columns(draw(5, 6), torch.ones(6), result)
    assert torch.equal(folded[:, 9:].abs(), torch.zeros(5, 3, dtype=torch.float64))


def test_the_last_copy_carries_the_remainder() -> None:
    result = make(torch.tensor([1.0, 5.0, 0.0, 1.0, 5.0, 0.0]), 0.0)  # 5 is (2, 2, 1)
    assert result.index.tolist() == [0, 1, 2, 3, 4, 5, 1, 1, 4, 4]
    pieces = (5 * result.share[[1, 6, 7, 4, 8, 9]]).tolist()
    assert pieces == pytest.approx([2, 2, 1, 2, 2, 1], abs=1e-14)


def test_pruning_fills_the_dropped_places_with_copies_by_channel() -> None:
    size = torch.tensor([1.0, 6.0, 0.0, 1.0, 4.0, 0.0])
    importance = torch.tensor([3.0, 0.0, 1.0, 2.0, 0.0, 9.0])
    result = reconstruct(torch.ones(6), size, importance, 0.0, mode="prune", staggered=True)
    assert result.dropped.tolist() == [0, 2, 3]
    assert result.index.tolist() == [1, 1, 1, 4, 4, 5]
    assert result.offset is not None and result.offset.dtype == torch.float32
    expected = torch.tensor([0.0, -1 / 3, 1 / 3, 0.25, -0.25, 0.0])
    assert float((result.offset - expected).abs().max()) <= OFFSET_ROUNDING


def test_the_tile_divides_the_columns() -> None:
    for tile in (1, 16, 128):
        result = make(sizes(100, 2), 1.0, tile=tile)
        assert result.copies > 0 and len(result.index) % tile == 0
        assert len(result.index) == 100 + result.copies + result.padding
        assert result.padding < tile


# Nothing to do.


def is_untouched(result: Reconstruction, n: int) -> bool:
    share_is_one = torch.equal(result.share, torch.ones(n, dtype=torch.float64))
    return result.is_identity and share_is_one and result.copies == result.strong == 0


@MODES
def test_equal_sizes_have_no_strong_channel(mode: str) -> None:
    """The mean of n tenths is not always a tenth; that must not make every channel strong."""
    for n in range(1, 200):
        for alpha in (0.0, 5.0):
            size = torch.full((n,), 0.1, dtype=torch.float64)
            assert is_untouched(make(size, alpha, mode=mode, tile=128, staggered=True), n)


@MODES
def test_a_huge_alpha_or_dead_channels_alone_change_nothing(mode: str) -> None:
    assert is_untouched(make(sizes(50, 1), 1e308, mode=mode), 50)
    assert is_untouched(make(torch.zeros(50), 0.0, mode=mode), 50)


def test_dead_channels_beside_live_ones_keep_one_column() -> None:
    size = torch.cat([torch.zeros(30, dtype=torch.float64), sizes(30, 4)])
    result = make(size, 0.0)
    assert torch.bincount(result.index, minlength=60)[:30].tolist() == [1] * 30
    assert result.share[:30].tolist() == [1.0] * 30


def test_anything_changed_is_not_an_identity() -> None:
    size = torch.tensor([1.0, 6.0, 0.0, 1.0, 4.0, 0.0])
    for mode in ("prune", "pad"):
        assert not make(size, 0.0, mode=mode).is_identity
    untouched = make(torch.ones(6), 0.0)
    assert untouched.is_identity
    assert not replace(untouched, offset=torch.full((6,), 0.25)).is_identity


# Bounded growth.


def slow_copies(size: list[float], wanted: list[int], room: int) -> list[int]:
    given = [0] * len(size)
    for k in sorted(range(len(size)), key=lambda k: (-size[k], k)):
        while given[k] < wanted[k] and sum(given) < room:
            given[k] += 1
    return given


@pytest.mark.parametrize("tile", [1, 8])
def test_growth_is_bounded_and_the_largest_are_split_first(tile: int) -> None:
    n = 64
    for seed in range(10):
        size = sizes(n, seed).round(decimals=1)  # ties
        free = make(size, 0.0)
        wanted = (torch.bincount(free.index, minlength=n) - 1).tolist()
        for most in range(n, n + free.copies + 2 * tile):
            result = make(size, 0.0, tile=tile, most_columns=most)
            used = result.index[: n + result.copies]
            given = (torch.bincount(used, minlength=n) - 1).tolist()
            assert given == slow_copies(size.tolist(), wanted, most // tile * tile - n)
            assert len(result.index) <= most and len(result.index) % tile == 0
            assert result.left_out == sum(wanted) - sum(given)
            for k in range(n):
                if given[k] < wanted[k]:  # what pieces it got are equal
                    assert result.share[:n][k] == 1 / (given[k] + 1)


def test_no_room_at_all_leaves_an_identity_that_says_what_it_left_out() -> None:
    size = torch.tensor([1.0, 6.0, 0.0, 1.0, 4.0, 0.0])
    result = make(size, 0.0, tile=4, most_columns=7, staggered=True)
    assert result.is_identity
    assert (result.strong, result.copies, result.left_out) == (2, 0, 3)


# Arguments.


def test_the_folded_weight_keeps_its_dtype() -> None:
    result = make(sizes(20, 1), 0.0)
    folded = fold_columns(draw(3, 20).to(torch.float32), torch.ones(20), result)
    assert folded.dtype == torch.float32 and folded.shape == (3, len(result.index))
    assert result.index.dtype == result.dropped.dtype == torch.int64
    assert result.share.dtype == torch.float64


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"step": torch.tensor([1.0, 0.0, 1.0])}, "step must be positive"),
        ({"step": torch.tensor([1.0, math.inf, 1.0])}, "step must be positive and finite"),
        ({"size": torch.tensor([1.0, -1.0, 1.0])}, "not negative"),
        ({"size": torch.tensor([1.0, math.nan, 1.0])}, "size must be finite"),
        ({"importance": torch.tensor([1.0, math.nan, 1.0])}, "importance must be finite"),
        ({"importance": torch.ones(4)}, "one length"),
        ({"size": torch.ones(0)}, "one length"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"alpha": math.nan}, "alpha must be"),
        ({"tile": 0}, "tile must be"),
        ({"most_columns": 2}, "below the 3 channels"),
    ],
)
def test_wrong_arguments_are_refused(fault: dict[str, object], message: str) -> None:
    usual = {name: torch.ones(3) for name in ("step", "size", "importance")}
    with pytest.raises(ValueError, match=message):
        reconstruct(**{**usual, "alpha": 1.0, "mode": "pad", **fault})

"""Dimension reconstruction (paper 4.2, Eq. 6): large steps are split over copies of their channel.

A strong channel is read by several columns, each of whose weight carries a share of the step: the
activation code is the same in every copy and the shares add up to 1, so nothing changes but the
spread of the folded weight. The result is one gather of the norm's output.

Order of the columns. `pad`: channel k keeps column k, the copies follow by channel, then padding.
`prune` (the paper): channel k keeps column k, and the columns of the dropped channels, ascending,
take the copies by channel; K stays n.

Staggered rounding is not in the paper: p copies of equal share round X/s + (j + 1/2)/p - 1/2, and
their mean is round(p X/s) / p (Hermite's identity), p times finer than one copy.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# A remainder below this fraction of T is no copy of its own, and a channel that exceeds T by less
# is not strong: the mean of equal sizes may fall an ulp below them.
_SMALLEST_REMAINDER = 2.0**-30


@dataclass(frozen=True)
class Reconstruction:
    """What the columns of the linears that read one norm are made of.

    Attributes:
        index: int64 [K], the channel of the norm's output that a column reads.
        share: float64 [K], fraction of the channel's step that a column's weight carries. Over the
            p columns of a kept channel they add up to 1, to p + 2 roundings of 2^-53.
        offset: float32 [K], added before rounding, in activation steps; None: 0 everywhere.
        strong: channels whose size exceeds T.
        copies: M, columns added.
        left_out: copies that were wanted and did not fit into `most_columns`.
        dropped: int64, channels that no column reads, ascending.
        padding: columns at the end with index 0 and share 0: their weight is 0.
    """

    index: Tensor
    share: Tensor
    offset: Tensor | None
    strong: int
    copies: int
    left_out: int
    dropped: Tensor
    padding: int

    @property
    def is_identity(self) -> bool:
        """Whether the columns are the channels: there is nothing to gather, add or store."""
        columns = torch.arange(len(self.index), device=self.index.device)
        return self.offset is None and torch.equal(self.index, columns)


def threshold(size: Tensor, alpha: float) -> float:
    """T = mean + alpha * std (Eq. 6), the population's std: the channels are all there are.

    The paper calls sigma the variance; only the standard deviation has the unit of T.

    Args:
        size: [n].
        alpha: paper: 5 for Llama-2, 2 for Llama-3.
    """
    size = size.to(torch.float64)
    return float(size.mean() + alpha * size.std(correction=0))


def reconstruct(
    step: Tensor,
    size: Tensor,
    importance: Tensor,
    alpha: float,
    *,
    mode: Literal["prune", "pad"],
    tile: int = 128,
    most_columns: int | None = None,
    staggered: bool = False,
) -> Reconstruction:
    """Split every channel with size > T into pieces (T, ..., T, size - mT).

    Args:
        step: [n], activation steps, positive; the shares are fractions of them.
        size: [n], what Eq. 6 is applied to: `step`, or step times the norm of the weight's column.
        importance: [n], diagonal of the Hessian: who is dropped first; `prune` only.
        alpha: of Eq. 6, at least 0; then M < n, since T is at least the mean.
        mode: `prune` drops M channels, so that K = n; `pad` drops none: K = n + M rounded up to
            `tile`, or n if M = 0.
        most_columns: bound of K, at least n. Where the copies do not fit, the largest sizes are
            split first; the last of them may get fewer pieces than it wants, which are then equal.
        staggered: copies of one channel have equal shares, and offsets between their roundings.

    Raises:
        ValueError: an argument is out of range, or `prune` cannot find M channels to drop.
    """
    _check(step, size, importance, alpha, tile, most_columns)
    size = size.to(torch.float64)
    limit = threshold(size, alpha)
    wanted = copies = _wanted_copies(size, limit)
    if mode == "pad" and most_columns is not None:
        copies = _copies_that_fit(wanted, size, most_columns // tile * tile - len(size))
    added = int(copies.sum())
    index, turn = _columns(copies)
    pieces = (copies + 1).to(torch.float64)
    share = _shares(size, limit, pieces, staggered | (copies < wanted), index, turn)
    offset = ((turn + 0.5) / pieces[index] - 0.5).to(torch.float32)
    dropped = channels_to_drop(wanted > 0, importance, added if mode == "prune" else 0)
    at = _places(len(index), dropped)
    padding = -len(at) % tile if mode == "pad" and added else 0
    return Reconstruction(
        index=F.pad(index[at], (0, padding)),
        share=F.pad(share[at], (0, padding)),
        offset=F.pad(offset[at], (0, padding)) if staggered and added else None,
        strong=int((wanted > 0).sum()),
        copies=added,
        left_out=int(wanted.sum()) - added,
        dropped=dropped,
        padding=padding,
    )


def channels_to_drop(strong: Tensor, importance: Tensor, count: int) -> Tensor:
    """The `count` channels that make room for copies, never a strong one (paper 4.2).

    Neighbours of strong channels come first, the least important of them before the others; only
    then, if they are too few, the rest by the same order. Of equals the lower channel goes first.

    Args:
        strong: bool [n].
        importance: [n].

    Returns:
        int64 [count], ascending.
    """
    available = len(strong) - int(strong.sum())
    if count > available:
        raise ValueError(
            f"{count} copies need as many channels to drop, but only {available} of {len(strong)} "
            "are not strong themselves: raise alpha, or pad instead of pruning"
        )
    beside = torch.zeros_like(strong)
    beside[:-1] |= strong[1:]
    beside[1:] |= strong[:-1]
    turn = torch.where(beside, 0, 1).masked_fill(strong, 2)
    order = torch.argsort(importance, stable=True)
    order = order[torch.argsort(turn[order], stable=True)]
    return order[:count].sort().values


def fold_columns(weight: Tensor, step: Tensor, reconstruction: Reconstruction) -> Tensor:
    """Migrated weight (Eq. 5) of the reconstructed columns: [out, n] and [n] to [out, K]."""
    index = reconstruction.index
    carried = step.to(torch.float64)[index] * reconstruction.share
    return weight[:, index] * carried.to(weight.dtype)


def as_they_are(channels: int, columns: int, device: torch.device) -> Reconstruction:
    """Every channel once, in its place, and padding up to `columns`."""
    padding = columns - channels
    index = torch.arange(channels, device=device)
    return Reconstruction(
        index=F.pad(index, (0, padding)),
        share=F.pad(torch.ones(channels, dtype=torch.float64, device=device), (0, padding)),
        offset=None,
        strong=0,
        copies=0,
        left_out=0,
        dropped=index[:0],
        padding=padding,
    )


def sort_columns(reconstruction: Reconstruction, size: Tensor) -> Reconstruction:
    """The same columns by falling size, so that neighbours can share a weight step.

    Args:
        size: [n], of a channel's whole folded column: its step times the norm of the weight's
            column. A column has its share of it, and padding none: it stays at the end.
    """
    folded = size.to(torch.float64)[reconstruction.index] * reconstruction.share
    order = torch.argsort(folded, descending=True, stable=True)
    offset = reconstruction.offset
    return replace(
        reconstruction,
        index=reconstruction.index[order],
        share=reconstruction.share[order],
        offset=None if offset is None else offset[order],
    )


def _check(
    step: Tensor,
    size: Tensor,
    importance: Tensor,
    alpha: float,
    tile: int,
    most_columns: int | None,
) -> None:
    n = len(size)
    if n == 0 or not step.shape == size.shape == importance.shape == (n,):
        shapes = [list(tensor.shape) for tensor in (step, size, importance)]
        raise ValueError(f"step, size and importance must be vectors of one length, not {shapes}")
    if not bool((step > 0).all() and torch.isfinite(step).all()):
        raise ValueError("step must be positive and finite in every channel")
    if not bool((size >= 0).all() and torch.isfinite(size).all()):
        raise ValueError("size must be finite and not negative in every channel")
    if not bool(torch.isfinite(importance).all()):
        raise ValueError("importance must be finite in every channel")
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be finite and at least 0, not {alpha}")
    if tile < 1:
        raise ValueError(f"tile must be at least 1, not {tile}")
    if most_columns is not None and most_columns < n:
        raise ValueError(f"most_columns is {most_columns}, below the {n} channels there are")


def _wanted_copies(size: Tensor, limit: float) -> Tensor:
    """ceil(size / T) - 1, the m of the paper's (T, ..., T, size - mT): int64 [n]."""
    if limit == 0:  # every size is 0
        return torch.zeros_like(size, dtype=torch.int64)
    pieces = torch.ceil(size / limit - _SMALLEST_REMAINDER)
    return (pieces - 1).clamp(min=0).to(torch.int64)


def _copies_that_fit(wanted: Tensor, size: Tensor, room: int) -> Tensor:
    """At most `room` copies, the largest sizes first, of equals the lower channel: int64 [n]."""
    order = torch.argsort(size, descending=True, stable=True)
    in_turn = wanted[order]
    left = (room - (in_turn.cumsum(0) - in_turn)).clamp(min=0)
    fitting = torch.empty_like(wanted)
    fitting[order] = torch.minimum(in_turn, left)
    return fitting


def _columns(copies: Tensor) -> tuple[Tensor, Tensor]:
    """Channels, then copies by channel: (channel, j of its 0..p-1 pieces), int64 [n + M]."""
    channels = torch.arange(len(copies), device=copies.device)
    index = torch.cat([channels, channels.repeat_interleave(copies)])
    first = copies.cumsum(0) - copies
    added = index[len(channels) :]
    turn = torch.arange(len(added), device=copies.device) - first[added] + 1
    return index, torch.cat([torch.zeros_like(channels), turn])


def _places(columns: int, dropped: Tensor) -> Tensor:
    """Which column stands at each place, the last ones in those that are dropped: int64."""
    at = torch.arange(columns, device=dropped.device)
    kept = columns - len(dropped)
    at[dropped] = torch.arange(kept, columns, device=dropped.device)
    return at[:kept]


def _shares(
    size: Tensor, limit: float, pieces: Tensor, equal: Tensor, index: Tensor, turn: Tensor
) -> Tensor:
    """float64 [n + M]: T / size, what is left for a channel's last piece, or 1 / p if `equal`."""
    full = torch.where(pieces > 1, limit / size, 0.0)  # a channel alone is all remainder
    remainder = 1 - (pieces - 1) * full
    split = torch.where(turn == pieces[index] - 1, remainder[index], full[index])
    return torch.where(equal[index], 1 / pieces[index], split)

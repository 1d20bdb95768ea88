"""Runs of input columns that share a weight step: groups of one length, or segments of any."""

from collections.abc import Sequence

SEGMENT_UNIT = 32  # every segment but the last is a multiple of it


def span_slices(
    columns: int, group_size: int | None, segments: Sequence[int] | None
) -> list[slice] | None:
    """Return the columns of each weight step of an output channel, ascending.

    Args:
        columns: K.
        group_size: columns of a group, of which the last may be short; None: no groups.
        segments: lengths of the segments, which add up to K; None: no segments.

    Returns:
        slices that cover all columns, or None for one step per output channel, whose order of
        operations is another (`reference`): a single group or segment is not the same.

    Raises:
        ValueError: there are groups as well as segments, or a segment's length is wrong.
    """
    if segments is not None:
        return _segment_slices(columns, group_size, segments)
    return None if group_size is None else run_slices(columns, group_size)


def run_slices(columns: int, length: int) -> list[slice]:
    """Return `columns` columns cut into runs of `length`; the last one may be short."""
    return [slice(at, min(at + length, columns)) for at in range(0, columns, length)]


def _segment_slices(columns: int, group_size: int | None, segments: Sequence[int]) -> list[slice]:
    if group_size is not None:
        raise ValueError(f"weights are in groups of {group_size} or in segments, not in both")
    if sum(segments) != columns or min(segments, default=0) < 1:
        raise ValueError(f"segments {tuple(segments)} do not add up to {columns} columns")
    cut = [length for length in segments[:-1] if length % SEGMENT_UNIT]
    if cut:
        raise ValueError(f"a segment of {cut[0]} columns is no multiple of {SEGMENT_UNIT}")
    ends = [sum(segments[: number + 1]) for number in range(len(segments))]
    return [slice(end - length, end) for end, length in zip(ends, segments, strict=True)]

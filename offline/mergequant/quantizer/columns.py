"""How many columns the linears behind a norm have, and the runs that they are cut into."""

from mergequant.errors import InputError
from mergequant.options import Options
from mergequant.quantizer.inputs.static import ColumnsPlan
from mergequant_vllm.packing import STREAM_CODES

_TILE, _NARROW_TILE, _NARROW = 128, 16, 1024
_ROUNDING = 1e-6  # channels; K / n - 1 is given as a float


def columns_plan(options: Options, channels: int) -> ColumnsPlan | None:
    """The columns behind a norm of `channels` channels; None: the channels as they are.

    Raises:
        InputError: `pad` has no room to grow.
    """
    mode = options.reconstruction
    assert mode != "auto" and not isinstance(options.alpha, str)  # a pilot has decided
    if mode == "none" and options.segments is None:
        return None
    return ColumnsPlan(
        mode=mode,
        count=channels if mode == "none" else reconstructed_columns(options, channels),
        alpha=options.alpha,
        split_by=options.split_by,
        staggered=options.staggered,
        sorted=options.segments is not None,
    )


def segment_lengths(columns: int, count: int) -> tuple[int, ...]:
    """`count` runs of about equal length, whole multiples of 32 columns but for the last.

    Raises:
        InputError: the columns do not make so many.
    """
    length = -(-columns // count // STREAM_CODES) * STREAM_CODES
    last = columns - length * (count - 1)
    if last < 1:
        raise InputError(
            f"--segments {count} is too much for {columns} columns in runs of {STREAM_CODES}: give "
            f"{max(2, columns // STREAM_CODES)} or fewer."
        )
    return (*(length,) * (count - 1), last)


def reconstructed_columns(options: Options, channels: int) -> int:
    """K of the linears behind a reconstructed norm.

    Raises:
        InputError: `pad` has no room to grow.
    """
    if options.reconstruction == "prune":
        return channels
    columns = padded_columns(options, channels)
    if columns <= channels:
        tile = tile_of(channels)
        least = (channels // tile + 1) * tile / channels - 1
        raise InputError(
            f"--reconstruction pad has no room: {channels} channels and "
            f"{options.max_extra_channels:.1%} more make no further tile of {tile}: "
            f"give --max-extra-channels {least:.3f} or more, or --reconstruction prune."
        )
    return columns


def padded_columns(options: Options, channels: int) -> int:
    """The longest K that `max_extra_channels` allows, in whole tiles; may be below `channels`."""
    tile = tile_of(channels)
    return int(channels * (1 + options.max_extra_channels) + _ROUNDING) // tile * tile


def tile_of(channels: int) -> int:
    """K is padded to what the GPU kernels work on; a narrow model runs anywhere, in small steps."""
    return _TILE if channels >= _NARROW else _NARROW_TILE

"""Tiles of the Triton linear: the defaults, and what a benchmark may measure instead of them.

Which one runs: `tile_tables`.
"""

from itertools import product
from typing import NamedTuple

from mergequant_vllm.kernels.linear.triton.layout import TritonLayout, choose_layout

KIB = 1024
_WANTED_PROGRAMS = 128  # about as many as GPUs of these capabilities have multiprocessors
# GPUs with less shared memory hold a 128 x 256 tile's sums in registers that they do not have.
_LARGEST_TILE_NEEDS = 200 * KIB
_BARRIERS = 256  # bytes that the compiler adds for its own synchronisation

# Shared memory of one program, by compute capability (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability").
_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227}


class Tile(NamedTuple):
    """What one program computes and how it is compiled; block_k counts codes."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class LinearShape(NamedTuple):
    """What tiles are chosen for, besides the number of tokens."""

    out_features: int
    in_features: int
    weight_bits: int
    group_size: int | None

    @property
    def layout(self) -> TritonLayout:
        """The layout of its weights."""
        return choose_layout(self.in_features, self.weight_bits, self.group_size)

    @property
    def groups(self) -> int:
        """Weight steps of an output in the kernel's layout, those of padding included."""
        return 1 if self.group_size is None else -(-self.layout.columns // self.group_size)


# Tokens, outputs and warps of the default tiles, the largest first.
_DEFAULTS = (
    (128, 256, 8),
    (128, 128, 8),
    (64, 128, 8),
    (64, 64, 4),
    (32, 128, 4),
    (32, 64, 4),
    (32, 32, 2),
    (16, 128, 4),
    (16, 64, 4),
    (16, 32, 2),
)


def shared_limit(capability: int | None) -> int:
    """Bytes of shared memory that one program may use; 99 KiB where it is not known."""
    return _SHARED.get(capability or 0, 99) * KIB


def stage_bytes(tile: Tile, shape: LinearShape) -> int:
    """Shared memory that one stage of the pipeline fills: codes, weights and a group's steps."""
    weights = tile.block_n * tile.block_k * shape.layout.bits // 8
    steps = 0
    if shape.group_size is not None:
        steps = 4 * tile.block_n * max(1, tile.block_k // shape.group_size)
    return tile.block_m * tile.block_k + weights + steps


def shared_bytes(tile: Tile, shape: LinearShape) -> int:
    """Upper bound of a program's shared memory: the pipeline, or the turned output after it.

    The output is turned in its own dtype, at most four bytes, with padding between rows.
    """
    turned = 4 * (tile.block_m + 4) * (tile.block_n + 4)
    return max(tile.num_stages * stage_bytes(tile, shape), turned) + _BARRIERS


def fit_to_layout(tile: Tile, layout: TritonLayout) -> Tile:
    """`tile` with a block_k that the layout allows."""
    block_k = max(layout.tile, min(tile.block_k, layout.largest_step))
    return tile._replace(block_k=block_k)


def default_tile(shape: LinearShape, tokens: int, limit: int) -> Tile:
    """The largest tile that leaves each multiprocessor a program, by reasoning, not measured.

    Args:
        shape: the linear.
        tokens: M.
        limit: bytes of shared memory of one program.
    """
    largest_m = _power_of_two(tokens)
    widest = 256 if shape.group_size is None and limit >= _LARGEST_TILE_NEEDS else 128
    fitting = [(m, n, warps) for m, n, warps in _DEFAULTS if m <= largest_m and n <= widest]
    block_m, block_n, warps = next(
        (
            (m, n, warps)
            for m, n, warps in fitting
            if -(-tokens // m) * -(-shape.out_features // n) >= _WANTED_PROGRAMS
        ),
        fitting[-1],
    )
    block_k = 128 if block_m >= 64 else 256
    tile = fit_to_layout(Tile(block_m, block_n, block_k, warps, 1), shape.layout)
    return tile._replace(num_stages=_stages(tile, shape, limit))


def _stages(tile: Tile, shape: LinearShape, limit: int) -> int:
    """As many as leave room for a second program, if those are three, else as many as fit."""
    one = stage_bytes(tile, shape)
    fitting = (limit // 2 - _BARRIERS) // one
    if fitting < 3:
        fitting = (limit - _BARRIERS) // one
    return max(1, min(fitting, 4 if tile.block_m >= 64 else 8))


def candidates(shape: LinearShape, tokens: int, limit: int) -> list[Tile]:
    """Tiles worth measuring: those that fit shared memory and leave registers for the sums.

    Args:
        shape: the linear.
        tokens: M.
        limit: bytes of shared memory of one program, `shared_limit`.
    """
    layout = shape.layout
    largest_m = min(_power_of_two(tokens), 256)
    sums = 1 if shape.group_size is None else 2  # int32, and float32 where there are groups
    blocks = product((16, 32, 64, 128, 256), (32, 64, 128, 256), (32, 64, 128, 256, 512))
    found = []
    for (block_m, block_n, block_k), warps, stages in product(blocks, (2, 4, 8), (2, 3, 4, 6)):
        tile = Tile(block_m, block_n, block_k, warps, stages)
        registers = sums * block_m * block_n // (32 * warps)
        if (
            min(largest_m // 2, 64) <= block_m <= largest_m
            and 8 <= registers <= 128
            and block_k >= min(128, layout.largest_step)
            and tile == fit_to_layout(tile, layout)
            and shared_bytes(tile, shape) <= limit
        ):
            found.append(tile)
    return found


def _power_of_two(tokens: int) -> int:
    """The smallest power of two that holds `tokens`, at least 16."""
    return max(16, 1 << (tokens - 1).bit_length())

"""Which tile of the output a program of the Triton linear computes: by reasoning, not measured."""

import functools
import math
from typing import NamedTuple

import torch

from mergequant_vllm.kernels.capability import read_capability
from mergequant_vllm.kernels.linear.spans import span_slices
from mergequant_vllm.kernels.linear.triton.layout import TritonLayout, choose_layout

KIB = 1024
_WANTED_PROGRAMS = 128  # about as many as GPUs of these capabilities have multiprocessors
# GPUs with less shared memory hold a 128 x 256 tile's sums in registers that they do not have.
_LARGEST_TILE_NEEDS = 200 * KIB
LONGEST_GROUP = 256  # of segments
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
    """What tiles are chosen for, besides the number of tokens; see `LinearSpec`."""

    out_features: int
    in_features: int
    weight_bits: int
    group_size: int | None
    segments: tuple[int, ...] | None = None

    @property
    def group(self) -> int | None:
        """Columns between two places where sums may end; None: they end with the row.

        Segments are runs of groups. A power of two, so that weights keep their width, and not above
        LONGEST_GROUP, because K is padded to whole groups.
        """
        if self.segments is None:
            return self.group_size
        return math.gcd(LONGEST_GROUP, *self.segments[:-1])

    @property
    def layout(self) -> TritonLayout:
        """The layout of its weights."""
        return choose_layout(self.in_features, self.weight_bits, self.group)

    @property
    def groups(self) -> int:
        """Groups of a row in the kernel's layout, those of padding included."""
        return 1 if self.group is None else -(-self.layout.columns // self.group)

    @property
    def spans(self) -> int:
        """Weight steps of an output in the kernel's layout, those of padding included."""
        return self.groups if self.segments is None else len(self.segments)

    def segment_ends(self) -> list[int] | None:
        """Return for each group the segment that ends with it, or -1; None without segments.

        The last segment has the padding.
        """
        spans = span_slices(self.in_features, None, self.segments)
        if spans is None or self.group is None:
            return None
        ends = [-1] * self.groups
        for number, span in enumerate(spans[:-1]):
            ends[span.stop // self.group - 1] = number
        ends[-1] = len(spans) - 1
        return ends


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
    """Return the bytes of shared memory that one program may use; 99 KiB where it is not known."""
    return _SHARED.get(capability or 0, 99) * KIB


def stage_bytes(tile: Tile, shape: LinearShape) -> int:
    """Return the bytes that one stage of the pipeline fills: codes, weights, a group's steps."""
    weights = tile.block_n * tile.block_k * shape.layout.bits // 8
    steps = 0
    if shape.group is not None:
        steps = 4 * tile.block_n * max(1, tile.block_k // shape.group)
    return tile.block_m * tile.block_k + weights + steps


def fit_to_layout(tile: Tile, layout: TritonLayout) -> Tile:
    """Return `tile` with a block_k that the layout allows."""
    block_k = max(layout.tile, min(tile.block_k, layout.largest_step))
    return tile._replace(block_k=block_k)


def default_tile(shape: LinearShape, tokens: int, limit: int) -> Tile:
    """Return the largest tile that leaves each multiprocessor a program.

    Args:
        shape: the linear.
        tokens: M.
        limit: bytes of shared memory of one program.
    """
    largest_m = _power_of_two(tokens)
    widest = 256 if shape.group is None and limit >= _LARGEST_TILE_NEEDS else 128
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
    """Stages that leave room for a second program, if three do, else as many as fit."""
    one = stage_bytes(tile, shape)
    fitting = (limit // 2 - _BARRIERS) // one
    if fitting < 3:
        fitting = (limit - _BARRIERS) // one
    return max(1, min(fitting, 4 if tile.block_m >= 64 else 8))


def tile_for(shape: LinearShape, tokens: int, device: torch.device) -> Tile:
    """Return the tile to run: the same in every run on one GPU.

    Args:
        shape: the linear.
        tokens: M, at least 1.
        device: a GPU; the CPU for the interpreter.
    """
    if device.type == "cpu":
        return default_tile(shape, tokens, shared_limit(None))
    return _tile_on_gpu(shape, tokens, device.index or 0)


@functools.lru_cache(maxsize=4096)
def _tile_on_gpu(shape: LinearShape, tokens: int, device: int) -> Tile:
    return default_tile(shape, tokens, shared_limit(read_capability(device)))


def _power_of_two(tokens: int) -> int:
    """The smallest power of two that holds `tokens`, at least 16."""
    return max(16, 1 << (tokens - 1).bit_length())

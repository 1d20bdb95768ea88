"""Shapes of linears, and the rule that picks a tile for a number of tokens and a shape."""

import pytest
import torch

from mergequant_vllm.kernels.linear.triton import tiles
from mergequant_vllm.kernels.linear.triton.tiles import (
    LinearShape,
    default_tile,
    fit_to_layout,
    shared_limit,
    stage_bytes,
    tile_for,
)

SHAPE = LinearShape(4096, 4096, 4, None)
SHAPES = [
    LinearShape(n, k, bits, group)
    for n, k in ((1, 1), (4096, 4096), (28672, 896))
    for bits in (3, 4, 8)
    for group in (None, 32, 96, 128, 512)
]
SHAPES += [LinearShape(4096, 4096, bits, None, (32, 96, 3968)) for bits in (3, 4, 8)]
CAPABILITIES = [80, 86, 90, 100, 120, None]


def test_segments_are_runs_of_groups() -> None:
    def shape(*segments: int) -> LinearShape:
        return LinearShape(1, sum(segments), 4, None, segments)

    assert (shape(107).group, shape(107).segment_ends()) == (256, [0])
    assert (shape(64, 43).group, shape(64, 43).segment_ends()) == (64, [0, 1])
    assert (shape(96, 64, 1).group, shape(96, 64, 1).segment_ends()) == (32, [-1, -1, 0, -1, 1, 2])
    wide = shape(512, 512, 3072)
    assert wide.group == 256 and wide.layout.bits == 4
    assert wide.segment_ends() == [-1, 0, -1, 1, *[-1] * 11, 2]
    # Padding is the last segment's: a tile of the layout has more groups than there are columns.
    padded = shape(32, 1)
    assert padded.segment_ends() == [0, *[-1] * (padded.groups - 2), 1]
    assert LinearShape(1, 64, 4, 32).segment_ends() is None


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_default_tiles_fit(capability: int | None) -> None:
    limit = shared_limit(capability)
    for shape in SHAPES:
        for tokens in (1, 16, 17, 64, 65, 300, 8192):
            tile = default_tile(shape, tokens, limit)
            assert tile == fit_to_layout(tile, shape.layout)
            turned = 4 * (tile.block_m + 4) * (tile.block_n + 4)  # the output, after the pipeline
            assert max(tile.num_stages * stage_bytes(tile, shape), turned) < limit
            assert tile.num_stages >= 2


def test_default_tiles_grow_with_tokens_and_outputs() -> None:
    limit = shared_limit(90)
    chosen = [default_tile(SHAPE, tokens, limit)[:2] for tokens in (1, 16, 17, 64, 128, 512, 8192)]
    assert chosen == [(16, 32), (16, 32), (32, 32), (32, 64), (64, 64), (128, 128), (128, 256)]
    assert default_tile(LinearShape(28672, 4096, 4, None), 1, limit)[:2] == (16, 128)
    assert default_tile(LinearShape(28672, 4096, 4, 128), 8192, limit)[:2] == (128, 128)


def test_the_gpu_is_asked_for_its_shared_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(tiles, "read_capability", lambda device: asked.append(device) or 90)
    tiles._tile_on_gpu.cache_clear()
    for _ in range(2):
        tile = tile_for(SHAPE, 1, torch.device("cuda", 1))
        assert tile == default_tile(SHAPE, 1, shared_limit(90))
    tiles._tile_on_gpu.cache_clear()
    assert asked == [1]


def test_the_interpreter_takes_the_least_shared_memory() -> None:
    assert tile_for(SHAPE, 1, torch.device("cpu")) == default_tile(SHAPE, 1, shared_limit(None))

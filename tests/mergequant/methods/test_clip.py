"""Clip ratios: the chosen one is the best of the grid, by the error spelled out."""

import torch

from mergequant.methods.clip import (
    ChannelClipStatistics,
    choose_channel_clips,
    clip_grid,
    token_clip_losses,
)
from mergequant_vllm.rounding import round_to_codes

GRID = clip_grid(0.4, 13)


def test_the_grid_ends_at_1() -> None:
    assert float(GRID[0]) == 0.4 and float(GRID[-1]) == 1.0 and len(GRID) == 13


def statistics_of(x: torch.Tensor) -> ChannelClipStatistics:
    seen = ChannelClipStatistics.empty(len(GRID), x.shape[1], x.device)
    for part in x.split(100):
        seen.add(part, x.abs().amax(0), GRID, 4)
    return seen


def test_statistics_add_up_over_batches() -> None:
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    seen, largest = statistics_of(x), x.abs().amax(0)
    step = largest * float(GRID[4]) / 7
    codes = round_to_codes(x / step, 4)
    assert torch.allclose(seen.error[4], (x - codes * step).square().sum(0).double(), rtol=1e-5)
    assert torch.allclose(seen.energy[4], codes.square().sum(0).double())


def test_a_channel_with_one_spike_is_clipped_and_a_uniform_one_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2000, 2, generator=generator) * 2 - 1
    x[:, 0] *= 0.3
    x[7, 0] = 1.0  # a lone spike sets the range of channel 0
    weight = torch.randn(16, 2, generator=generator)
    clips = choose_channel_clips(statistics_of(x), weight, x.abs().amax(0), GRID, 4)
    assert float(clips[0]) < 0.6
    assert float(clips[1]) >= 0.9


def test_token_losses_are_the_output_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 12, generator=generator)
    weight = torch.randn(6, 12, generator=generator)
    losses = token_clip_losses(x, weight, GRID, 4)
    step = x.abs().amax(1, keepdim=True) * float(GRID[6]) / 7
    error = (x - round_to_codes(x / step, 4) * step) @ weight.T
    assert torch.allclose(losses[6], error.square().sum().double(), rtol=1e-4)


def test_long_tails_prefer_a_clip_below_1() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 256, generator=generator)
    losses = token_clip_losses(x, torch.randn(8, 256, generator=generator), GRID, 4)
    assert float(GRID[losses.argmin()]) < 1.0

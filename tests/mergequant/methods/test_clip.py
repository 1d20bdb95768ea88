"""Clip ratios: the chosen one is the best of the grid, by the error spelled out."""

import torch

from mergequant.methods.clip import (
    ChannelClipStatistics,
    ChannelRange,
    choose_channel_clips,
    choose_token_clip,
    clip_grid,
    token_clip_losses,
)
from mergequant_vllm.rounding import round_to_codes

GRID = clip_grid(0.4, 13)


def test_the_grid_ends_at_1() -> None:
    assert float(GRID[0]) == 0.4 and float(GRID[-1]) == 1.0 and len(GRID) == 13


def symmetric(x: torch.Tensor) -> ChannelRange:
    return ChannelRange.symmetric(x.abs().amax(0), 4)


def statistics_of(x: torch.Tensor, spans: ChannelRange | None = None) -> ChannelClipStatistics:
    sums = ChannelClipStatistics.empty(len(GRID), x.shape[1], x.device)
    for part in x.split(100):
        sums.add(part, spans or symmetric(x), GRID, 4)
    return sums


def test_statistics_add_up_over_batches() -> None:
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    sums, largest = statistics_of(x), x.abs().amax(0)
    step = largest * float(GRID[4]) / 7
    codes = round_to_codes(x / step, 4)
    assert torch.allclose(sums.error[4], (x - codes * step).square().sum(0).double(), rtol=1e-5)
    assert torch.allclose(sums.energy[4], codes.square().sum(0).double())


def test_a_channel_with_one_spike_is_clipped_and_a_uniform_one_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2000, 2, generator=generator) * 2 - 1
    x[:, 0] *= 0.3
    x[7, 0] = 1.0  # a lone spike sets the range of channel 0
    weight = torch.randn(16, 2, generator=generator)
    clips = choose_channel_clips(statistics_of(x), weight, symmetric(x), GRID)
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


def test_zero_points_use_every_code_of_a_channels_range() -> None:
    """The ends of the range have the lowest and the highest code, and are met exactly."""
    x = torch.tensor([[-1.0, 5.0, 2.0], [3.0, 9.0, 2.0], [0.5, 7.0, 2.0]])
    spans = ChannelRange.between(x.amin(0), x.amax(0), 4)
    step = torch.where(spans.extent > 0, spans.extent / spans.levels, 1.0)
    shift = spans.shift(step)
    assert shift is not None
    codes = round_to_codes((x - shift) / step, 4)
    assert codes[0].tolist() == [-8, -8, 0] and codes[1].tolist() == [7, 7, 0]
    assert torch.allclose((codes * step + shift)[:2], x[:2], rtol=2.0**-22)


def test_a_one_sided_channel_loses_a_quarter_with_zero_points() -> None:
    """Half the step: a quarter of the square of the error, but for what is clipped."""
    x = torch.rand(4000, 3, generator=torch.Generator().manual_seed(1))
    spans = ChannelRange.between(x.amin(0), x.amax(0), 4)
    with_zero, without = statistics_of(x, spans).error[-1], statistics_of(x).error[-1]
    # 15 steps over the range instead of 7: (7 / 15)^2, and the last half step is not lost.
    assert bool((with_zero < 0.25 * without).all())


def test_the_screened_choice_is_that_of_all_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1600, 64, generator=generator) ** 3
    weight = torch.randn(8, 64, generator=generator)
    for zero_points in (False, True):
        losses = token_clip_losses(x, weight, GRID, 4, zero_points=zero_points)
        chosen = choose_token_clip([x[:700], x[700:]], weight, GRID, 4, zero_points=zero_points)
        assert chosen == float(GRID[losses.argmin()])

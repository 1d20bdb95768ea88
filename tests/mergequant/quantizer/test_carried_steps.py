"""Steps that v and up carry: one for all query heads that share a value, clipped by the search."""

import pytest
import torch
from torch import Tensor

from mergequant import Options
from mergequant.model.architecture import Linear
from mergequant.model.equalized_reader import as_carried, as_read
from mergequant.quantizer.carried_steps import carried_steps
from mergequant.quantizer.inputs.record import ClipSearch

MIXED = Linear("self_attn.o_proj", reads="attn_mix", writes="residual")
DOWN = Linear("mlp.down_proj", reads="mlp_mid", writes="residual")
CONFIG = {
    "vocab_size": 9,
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_tokens_of_heads_that_share_a_value_are_tokens_of_its_channels() -> None:
    x = torch.arange(2 * 24.0).reshape(2, 24)
    rows = as_carried(x, CONFIG, MIXED)
    assert rows.shape == (6, 8)
    for token in range(2):
        for head in range(6):  # 0, 1, 2 share the first value head, 3, 4, 5 the second
            value, place = divmod(head, 3)
            found = rows[token * 3 + place, value * 4 : value * 4 + 4]
            assert torch.equal(found, x[token, head * 4 : head * 4 + 4])
    assert torch.equal(as_carried(x[:, :10], CONFIG, DOWN), x[:, :10])


def test_numbers_of_values_are_given_to_each_head_that_reads_them() -> None:
    numbers = torch.arange(8.0)
    expected = torch.cat([numbers[:4]] * 3 + [numbers[4:]] * 3)
    assert torch.equal(as_read(numbers, CONFIG, MIXED), expected)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_without_a_search_nothing_is_clipped(bits: int) -> None:
    inputs = [numbers(3, 7, 24), numbers(2, 7, 24, seed=1)]
    steps = carried_steps(inputs, numbers(5, 24), MIXED, CONFIG, bits, 4, None)
    codes = torch.cat([x.reshape(-1, 24) for x in inputs]) / steps
    largest = codes.abs().amax(dim=0).reshape(2, 3, 4).amax(dim=1)
    torch.testing.assert_close(largest, torch.full_like(largest, 2 ** (bits - 1) - 1))


def test_channels_of_downs_input_have_headroom_at_8_bits() -> None:
    x = numbers(1, 50, 10) * torch.logspace(-3, 0, 10)
    steps = carried_steps([x], numbers(5, 10), DOWN, CONFIG, 8, 8, ClipSearch(0.4, 13))
    largest = x.abs().amax(dim=(0, 1))
    reach = 127 * steps.float()
    torch.testing.assert_close(reach[-1], 1.25 * largest[-1])
    torch.testing.assert_close(reach[0], largest.quantile(0.9))


def test_a_channel_that_hardly_fired_keeps_a_step_that_16_bits_hold() -> None:
    x = numbers(1, 50, 10)
    x[..., 3] = 1e-9
    steps = carried_steps([x], numbers(5, 10), DOWN, CONFIG, 4, 4, None)
    assert float(steps.max() / steps.min()) < 3000


def test_the_search_clips_what_is_rare() -> None:
    x = numbers(1, 2000, 10)
    x[0, 0] = 30.0
    default = Options()
    search = ClipSearch(default.lowest_clip, default.clip_points)
    plain = carried_steps([x], numbers(5, 10), DOWN, CONFIG, 4, 4, None)
    clipped = carried_steps([x], numbers(5, 10), DOWN, CONFIG, 4, 4, search)
    assert bool((clipped < 0.7 * plain).all())

"""Step migration is lossless: in float64 to its last digits, and exactly in stored precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mergequant.methods.migrate import (
    activation_steps,
    fold_norm,
    migrate_weight,
)
from mergequant_vllm.rounding import round_to_codes

CHANNELS, TOKENS, OUT = 64, 50, 24
CLOSE = 1e-12  # float64 noise of a 64-term sum, far below any rounding of the method


def identity(x: Tensor) -> Tensor:
    return x


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def rms(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


def layer(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=0.0)


def random_case(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(TOKENS, CHANNELS, generator=generator, dtype=torch.float64)
    gamma = torch.randn(CHANNELS, generator=generator, dtype=torch.float64)  # both signs
    gamma[:3] = 0.0
    weight = torch.randn(OUT, CHANNELS, generator=generator, dtype=torch.float64)
    bias = torch.randn(OUT, generator=generator, dtype=torch.float64)
    return x, gamma, weight, bias


def explicit(y: Tensor, step: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Eq. 3 as it stands: quantize each channel with its own step, dequantize, multiply."""
    return (round_to_codes(y / step, 4) * step) @ weight.T + bias


@pytest.mark.parametrize("one_plus", [False, True], ids=["plain", "one_plus"])
def test_rms_norm_fold_is_lossless(generator: torch.Generator, one_plus: bool) -> None:
    x, gamma, weight, bias = random_case(generator)
    stored_weight = gamma - 1 if one_plus else gamma
    y = rms(x) * gamma
    step = activation_steps(y.abs().amax(0), torch.ones(CHANNELS), 7)
    folded = fold_norm(stored_weight, None, step, one_plus=one_plus, stored=identity)
    multiplier = folded.weight + 1 if one_plus else folded.weight
    served = round_to_codes(rms(x) * multiplier, 4) @ migrate_weight(weight, folded.step).T + bias
    assert torch.allclose(served, explicit(y, step, weight, bias), rtol=0, atol=CLOSE)
    assert folded.bias is None


def test_layer_norm_fold_is_lossless_with_beta_and_dead_channels(
    generator: torch.Generator,
) -> None:
    x, gamma, weight, bias = random_case(generator)
    beta = torch.randn(CHANNELS, generator=generator, dtype=torch.float64)
    beta[0] = 0.0  # gamma is 0 as well: the channel is silent
    y = layer(x) * gamma + beta
    step = activation_steps(y.abs().amax(0), torch.ones(CHANNELS), 7)
    folded = fold_norm(gamma, beta, step, stored=identity)
    assert folded.bias is not None
    codes = round_to_codes(layer(x) * folded.weight + folded.bias, 4)
    served = codes @ migrate_weight(weight, folded.step).T + bias
    assert torch.allclose(served, explicit(y, step, weight, bias), rtol=0, atol=CLOSE)


def test_the_fold_is_as_exact_in_stored_precision(generator: torch.Generator) -> None:
    """The rounded multiplier divides by a step of its own, and the weights absorb that one."""
    x, gamma, weight, bias = random_case(generator)
    y = rms(x) * gamma
    wanted = activation_steps(y.abs().amax(0), torch.ones(CHANNELS), 7)
    folded = fold_norm(gamma, None, wanted)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(folded.weight.to(dtype).to(torch.float64), folded.weight)
    alive = gamma != 0
    relative = (folded.step[alive] - wanted[alive]).abs() / wanted[alive]
    assert float(relative.max()) < 2**-7
    served = round_to_codes(rms(x) * folded.weight, 4) @ migrate_weight(weight, folded.step).T
    assert torch.allclose(served + bias, explicit(y, folded.step, weight, bias), atol=CLOSE)


def test_a_dead_channel_has_multiplier_0_and_the_wanted_step(generator: torch.Generator) -> None:
    _, gamma, _, _ = random_case(generator)
    folded = fold_norm(gamma, None, torch.full((CHANNELS,), 0.1, dtype=torch.float64))
    assert folded.weight[:3].tolist() == [0.0, 0.0, 0.0]
    assert folded.step[:3].tolist() == [0.1, 0.1, 0.1]


def test_steps_of_channels_that_never_fired_are_the_median() -> None:
    largest = torch.tensor([0.0, 7.0, 14.0, 21.0])
    step = activation_steps(largest, torch.ones(4), 7)
    assert step.tolist() == [2.0, 1.0, 2.0, 3.0]

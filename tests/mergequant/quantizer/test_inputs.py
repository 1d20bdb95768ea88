"""Inputs of linears: what training sees of them, and what zero points take away."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergequant.methods.migrate import FoldedNorm
from mergequant.methods.reconstruct import Reconstruction
from mergequant.methods.rotate import OnlineRotation
from mergequant.quantizer.inputs.dynamic import DynamicInput
from mergequant.quantizer.inputs.record import CalibratedInput
from mergequant.quantizer.inputs.static import ChannelCalibration, static_input
from mergequant.quantizer.inputs.static_input import StaticInput

CHANNELS = 12


def columns() -> Reconstruction:
    """Channel 3 twice, at different offsets; channel 5 dropped; two columns of padding."""
    index = torch.tensor([0, 1, 2, 3, 4, 3, 6, 7, 8, 9, 10, 11, 0, 0])
    share = torch.ones(14, dtype=torch.float64)
    share[[3, 5]], share[12:] = 0.5, 0.0
    offset = torch.zeros(14)
    offset[3], offset[5] = -0.25, 0.25
    dropped = torch.tensor([5])
    return Reconstruction(index, share, offset, 1, 1, 0, dropped, 2)


def calibration(shift: Tensor | None) -> ChannelCalibration:
    step = torch.linspace(0.5, 2.0, CHANNELS, dtype=torch.float64)
    folded = FoldedNorm(torch.ones(CHANNELS, dtype=torch.float64), None, step)
    ones = torch.ones(CHANNELS, dtype=torch.float64)
    return ChannelCalibration(folded, shift, ones, ones, ones)


def static(zero_points: bool, *, reconstructed: bool) -> StaticInput:
    shift = torch.linspace(-1.0, 1.0, CHANNELS, dtype=torch.float64) if zero_points else None
    made = columns() if reconstructed else None
    return static_input(calibration(shift), made, 4, {}, {})


def dynamic(zero_points: bool) -> DynamicInput:
    rotation = OnlineRotation(hadamard=4, heads=(3, 4))
    return DynamicInput(4, zero_points, torch.tensor([0.7]), rotation, {})


INPUTS: dict[str, CalibratedInput] = {
    "static": static(False, reconstructed=False),
    "static, columns": static(False, reconstructed=True),
    "static, zero points": static(True, reconstructed=False),
    "static, zero points, columns": static(True, reconstructed=True),
    "dynamic": dynamic(False),
    "dynamic, zero points": dynamic(True),
}


def tokens(seed: int = 0) -> Tensor:
    return 4 * torch.randn(50, CHANNELS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list(INPUTS))
def test_what_training_sees_is_what_is_rounded_to_half_a_step(name: str) -> None:
    """Rounding moves a value by half a step, clamping is the same on both sides."""
    source, x = INPUTS[name], tokens()
    exact, relaxed = source.dequantized(x), source.relaxed(x)
    step = torch.ones(len(x), 1)
    if isinstance(source, DynamicInput):
        z = source.rotation(x)
        extent = z.abs().amax(1, keepdim=True) / 7
        if source.zero_points:
            span = z.amax(1, keepdim=True).clamp(min=0) - z.amin(1, keepdim=True).clamp(max=0)
            extent = span / 15
        step = extent * source.clip
    # A zero point is itself rounded, by half a code; float32 adds some 2^-22 of the range.
    most = 1.0 if isinstance(source, DynamicInput) and source.zero_points else 0.5
    assert bool(((exact - relaxed).abs() <= step * (most + 1e-4)).all())
    assert not torch.equal(exact, relaxed)


@pytest.mark.parametrize("name", list(INPUTS))
def test_the_gradient_of_training_is_that_of_the_relaxed_input(name: str) -> None:
    """Against differences in float64, away from the ends at which codes saturate."""
    source, x = INPUTS[name], tokens(1)[:4].requires_grad_()
    towards = torch.randn(source.relaxed(x).shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((source.relaxed(x) * towards).sum(), x)
    with torch.no_grad():
        for row, channel in ((0, 0), (1, 3), (2, 7), (3, 11)):
            moved = []
            for sign in (1, -1):
                there = x.detach().clone()
                there[row, channel] += sign * 1e-2
                if isinstance(source, DynamicInput):
                    # A token's step is a constant to training: it is that of the point itself.
                    moved.append(_relaxed_with_the_step_of(source, x.detach(), there))
                else:
                    moved.append(source.relaxed(there))
            slope = float((((moved[0] - moved[1]).double() / 2e-2) * towards).sum())
            # Four float32 sums of 14 values of size 10, over 2e-2.
            assert abs(slope - float(gradient[row, channel])) <= 5e-3 * max(1.0, abs(slope))


def _relaxed_with_the_step_of(source: DynamicInput, at: Tensor, x: Tensor) -> Tensor:
    z, there = source.rotation(at), source.rotation(x)
    if source.zero_points:
        low = z.amin(-1, keepdim=True).clamp(max=0) * source.clip
        high = z.amax(-1, keepdim=True).clamp(min=0) * source.clip
        return there.clamp(low, high)
    step = z.abs().amax(-1, keepdim=True) * source.clip / 7
    return there.clamp(-8 * step, 7 * step)


@pytest.mark.parametrize("reconstructed", [False, True])
def test_codes_times_folded_weight_and_constant_are_the_product(reconstructed: bool) -> None:
    """In float64, with the input on the grid: W x = W_folded codes + W z, to 1e-12."""
    source = static(True, reconstructed=reconstructed)
    assert source.shift is not None
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, CHANNELS, generator=generator, dtype=torch.float64)
    codes = torch.randint(-8, 8, (30, CHANNELS), generator=generator).to(torch.float64)
    x = codes * source.step + source.shift
    folded = source.folded_weight(weight)
    if source.columns is not None:  # both copies of a channel have its code; padding has none
        codes = codes[:, source.columns.index] * (source.columns.share != 0)
        x[:, 5] = source.shift[5]  # what a dropped channel is taken for
    constant = source.output_offset(weight)
    assert constant is not None
    exact = weight @ source.shift
    assert torch.allclose(constant.double(), exact, rtol=2.0**-22, atol=2.0**-22)
    assert torch.allclose(codes @ folded.T + exact, x @ weight.T, rtol=1e-12, atol=1e-12)


def test_padding_learns_nothing_from_the_channel_that_it_reads(tmp_path: Path) -> None:
    source = INPUTS["static, columns"]
    assert not source.dequantized(tokens())[:, 12:].any()
    assert not source.relaxed(tokens())[:, 12:].any()

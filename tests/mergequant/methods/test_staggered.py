"""Staggered rounding: the copies of a channel round as one rounding in finer steps."""

import pytest
import torch
from torch import Tensor

from mergequant.methods.reconstruct import Reconstruction, fold_columns, reconstruct
from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.norm_round.reference import static_codes
from mergequant_vllm.rounding import round_to_codes
from tests.mergequant.methods.reconstruction_cases import BITS, OFFSET_ROUNDING, draw, make, sizes

LARGEST, SMALLEST = 7, -8


def p_copies(p: int) -> Reconstruction:
    """Channel 0 alone fires: T is 1/p of it, so it is read by p columns."""
    return make(torch.eye(p)[0], 0.0, staggered=True)


def staggered_value(x: Tensor, result: Reconstruction) -> Tensor:
    """What the columns of channel 0 make of values x [t], in activation steps."""
    assert result.offset is not None
    mine = result.index == 0
    rounded = round_to_codes(x[:, None] + result.offset[mine].to(torch.float64), BITS)
    return rounded @ result.share[mine]


@pytest.mark.parametrize("p", [2, 3, 4, 5, 8, 13])
def test_p_copies_resolve_p_times_finer(p: int) -> None:
    """An offset's float32 rounding moves a threshold by as much; nothing else is inexact."""
    half = 0.5 / p
    spacing = 2.0**-10
    x = torch.arange(SMALLEST - 1, LARGEST + 1 + spacing, spacing, dtype=torch.float64)
    value = staggered_value(x, p_copies(p))
    inside = (x >= SMALLEST - half) & (x <= LARGEST + half)
    error = (value - x).abs()[inside]
    assert float(error.max()) <= half + OFFSET_ROUNDING + 1e-12
    assert float(error.max()) >= half - spacing
    beyond = value[~inside] - x[~inside].clamp(SMALLEST, LARGEST)
    assert float(beyond.abs().max()) <= 1e-12  # the clamp of the code range, and no other


@pytest.mark.parametrize("p", [2, 4, 8])
def test_copies_are_one_rounding_in_finer_steps(p: int) -> None:
    """Hermite: the mean of round(x + offset_j) is round(p x) / p. Offsets are exact here."""
    x = 20 * torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 10
    expected = (torch.round(p * x) / p).clamp(SMALLEST, LARGEST)
    assert torch.equal(staggered_value(x, p_copies(p)), expected)


def test_the_output_error_shrinks_with_the_copies_through_the_served_rounding() -> None:
    """Exact weights: |error| <= sum_k |W_k| s_k (1/(2 p_k) + float32 rounding of x + offset)."""
    n, weight = 64, draw(9, 64)
    step = sizes(n, seed=3)
    x = (2 * draw(50, n, seed=1)).clamp(-LARGEST, LARGEST).to(torch.float32)  # in steps
    exact = (x.to(torch.float64) * step) @ weight.T
    result = reconstruct(step, step, torch.ones(n), 0.0, mode="pad", tile=16, staggered=True)
    index = result.index.to(torch.int32)
    assert result.offset is not None and result.copies > 0
    layout = CodeLayout.FLOAT32
    served = static_codes(x, BITS, layout, index=index, offset=result.offset).to(torch.float64)
    assert float(served.min()) >= SMALLEST and float(served.max()) <= LARGEST
    error = (served @ fold_columns(weight, step, result).T - exact).abs()
    pieces = torch.bincount(result.index[: n + result.copies], minlength=n)
    addition = 2.0**-22  # half an ulp of a float32 below 8
    bound = weight.abs() @ (step * (0.5 / pieces + OFFSET_ROUNDING + addition))
    assert bool((error <= bound * (1 + 1e-12)).all())
    plain = static_codes(x, BITS, layout).to(torch.float64)
    assert float(error.mean()) < float(((plain * step) @ weight.T - exact).abs().mean())


def test_unstaggered_copies_share_one_code() -> None:
    assert make(sizes(64, 3), 0.0).offset is None

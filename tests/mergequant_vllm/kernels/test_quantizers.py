"""Static rounding and per-token quantization, against the equations in exact arithmetic."""

from fractions import Fraction

import torch

from mergequant_vllm.kernels.norm_round.reference import static_codes
from mergequant_vllm.kernels.token_quant.reference import token_codes


def test_static_codes_round_and_clamp() -> None:
    x = torch.tensor([[-9.0, -0.5, 0.5, 1.5, 6.6, 99.0]], dtype=torch.bfloat16)
    assert static_codes(x, 4, torch.int8).tolist() == [[-8, 0, 0, 2, 7, 7]]


def test_token_codes_are_the_nearest_integers_to_the_exact_quotients() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 33, generator=generator)
    clip = torch.tensor([0.7])
    codes, step = token_codes(x, clip, 4, torch.int8)
    for row, row_codes in zip(x.tolist(), codes.tolist(), strict=True):
        exact_step = Fraction(0.7) * max(abs(Fraction(v)) for v in row) / 7
        for value, code in zip(row, row_codes, strict=True):
            quotient = Fraction(value) / exact_step
            nearest = min(max(round(quotient), -8), 7)
            # Three float32 roundings stand between the quotient and the code.
            near_tie = (
                abs(abs(quotient - round(quotient)) - Fraction(1, 2)) < abs(quotient) * 2**-21
            )
            assert code == nearest or near_tie
    expected = x.abs().amax(-1, keepdim=True) * clip / 7
    assert torch.equal(step, expected)


def test_a_token_of_zeros_has_codes_zero_and_a_finite_step() -> None:
    codes, step = token_codes(torch.zeros(2, 8), torch.ones(1), 4, torch.int8)
    assert codes.eq(0).all()
    assert torch.isfinite(step).all() and step.gt(0).all()


def test_huge_and_tiny_tokens_keep_their_codes() -> None:
    row = torch.tensor([-7.0, -3.0, 0.0, 1.0, 7.0])
    for scale in (2.0**-80, 1.0, 2.0**120):
        codes, _ = token_codes(row * scale, torch.ones(1), 4, torch.int8)
        assert codes.tolist() == [-7, -3, 0, 1, 7]

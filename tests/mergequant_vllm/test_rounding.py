"""The rounding rule at its ties and at its borders."""

import torch

from mergequant_vllm.rounding import (
    largest_code,
    round_to_16_bit,
    round_to_16_bit_normal,
    round_to_codes,
    round_to_codes_,
    smallest_code,
)


def test_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert round_to_codes(ties, 4).tolist() == [-2, -2, 0, 0, 2, 2, 4]


def test_codes_are_clamped_to_twos_complement() -> None:
    wide = torch.tensor([-1e30, -8.6, -8.4, 7.4, 7.6, 1e30])
    assert round_to_codes(wide, 4).tolist() == [-8, -8, -8, 7, 7, 7]
    expected = round_to_codes(wide, 4)
    assert round_to_codes_(wide, 4) is wide and torch.equal(wide, expected)
    assert (smallest_code(8), largest_code(8)) == (-128, 127)


def test_16_bit_values_are_the_same_in_every_model_dtype() -> None:
    values = torch.cat(
        [torch.logspace(-9, 6, 5000, dtype=torch.float64), torch.tensor([0.0, 65504.0, 6.1e-5])]
    )
    values = torch.cat([values, -values])
    for rounded in (round_to_16_bit(values), round_to_16_bit_normal(values)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert torch.equal(rounded.to(dtype).to(torch.float64), rounded)


def test_16_bit_rounding_is_as_close_as_bfloat16_allows() -> None:
    values = torch.logspace(-4, 4, 5000, dtype=torch.float64)
    error = ((round_to_16_bit(values) - values) / values).abs()
    # Half a unit of bfloat16's last place (2^-8), and of float16's (2^-11) for rounding twice.
    assert float(error.max()) <= 2**-8 + 2**-11


def test_normal_rounding_avoids_subnormals_and_keeps_zero_and_sign() -> None:
    small = torch.tensor([1e-7, -1e-7, 0.0, 1.0])
    assert round_to_16_bit_normal(small).tolist() == [2**-14, -(2**-14), 0.0, 1.0]

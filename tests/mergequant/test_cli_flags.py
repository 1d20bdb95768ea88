"""The three prices of quantizing, and what a flag given beside them means."""

from typing import Any

import pytest

from mergequant import InputError, Options
from mergequant.cli_flags import COMMON, METHOD, at_price


@pytest.mark.parametrize(
    ("flags", "price", "changed"),
    [
        ({}, {}, {}),
        ({}, {"fast": True}, {"compensation_rank": 0}),
        ({}, {"best": True}, {"average_bits": 5.0}),
        ({"average_bits": 6.0}, {"best": True}, {"average_bits": 6.0}),
        ({"within": 0.1}, {"best": True}, {"within": 0.1}),
        ({"average_bits": 6.0}, {"fast": True}, {"average_bits": 6.0, "compensation_rank": 0}),
    ],
)
def test_a_price_is_a_change_of_the_defaults(
    flags: dict[str, Any], price: dict[str, bool], changed: dict[str, Any]
) -> None:
    options = at_price(flags, **{"fast": False, "best": False, **price})
    assert options == Options.model_validate(changed)


def test_two_prices_are_none() -> None:
    with pytest.raises(InputError, match="two prices: give one of them"):
        at_price({}, fast=True, best=True)


def test_the_first_group_of_the_help_is_short() -> None:
    assert set(COMMON) | set(METHOD) <= set(Options.model_fields)
    assert not set(COMMON) & set(METHOD) and len(COMMON) <= 12

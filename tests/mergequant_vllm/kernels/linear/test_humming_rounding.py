"""How Humming's kernels round, by their emulation: against exact fractions, value by value."""

import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from mergequant_vllm.kernels.linear.humming.rounding import (
    emulate,
    emulate_epilogue,
    emulate_group_epilogue,
    largest_sum,
    multiply_add,
    power_of_two,
)
from mergequant_vllm.kernels.linear.reference import integer_products
from tests.mergequant_vllm.kernels.linear.humming_cases import SIXTEEN_BITS, gpu_spec
from tests.mergequant_vllm.kernels.made import (
    MadeLinear,
    make_linear,
    make_token_step,
    random_codes,
)


def nearest(value: Fraction, dtype: torch.dtype, *, bounded: bool = True) -> Fraction:
    """`value` rounded to the nearest, ties to even; `bounded`: with the dtype's smallest step."""
    if value == 0:
        return value
    bits = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24}[dtype]
    exponent = math.frexp(abs(float(value)))[1] - bits
    if bounded:
        info = torch.finfo(dtype)
        exponent = max(exponent, math.frexp(info.smallest_normal * info.eps)[1] - 1)
    step = Fraction(2) ** exponent
    return round(value / step) * step


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_epilogue_rounds_twice(dtype: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    products = torch.randint(-(2**17), 2**17, (40, 16), generator=generator)
    products[:8] //= 2**8
    scale = (torch.randn(16, generator=generator) / 64).to(dtype)
    added = torch.randn(16, generator=generator).to(dtype) if bias else None
    token = make_token_step(40) / 8
    for scale_first in (False, True):
        y = emulate_epilogue(products, scale, token, added, scale_first=scale_first)
        for t in range(40):
            for j in range(16):
                total = Fraction(int(products[t, j]))
                total = nearest(total * Fraction(float(token[t])), torch.float32)
                total = total if scale_first else nearest(total, dtype)
                total *= Fraction(float(scale[j]))
                if scale_first:
                    total = nearest(nearest(total, torch.float32), dtype)
                if added is not None:
                    total += Fraction(float(added[j]))
                assert float(y[t, j]) == float(nearest(total, dtype))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bfloat16", "float16"])
def test_groups_are_added_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    runs = list(torch.randint(-4096, 4096, (5, 30, 8), generator=generator))
    scale = (torch.rand(8, 5, generator=generator) / 50).to(dtype)
    token, bias = make_token_step(30), torch.randn(8, generator=generator).to(dtype)
    y = emulate_group_epilogue(runs, scale, token, bias)
    for t in range(30):
        for j in range(8):
            total = Fraction(0)
            for g, sums in enumerate(runs):
                added = int(sums[t, j]) * Fraction(float(scale[j, g]))
                total = nearest(total + added, torch.float32)
            total = nearest(total * Fraction(float(token[t])), torch.float32)
            total = nearest(nearest(total, dtype) + Fraction(float(bias[j])), dtype)
            assert float(y[t, j]) == float(total)


@pytest.mark.parametrize(("capability", "length"), [(None, 64), (89, 64), (90, 128), (120, 64)])
def test_groups_are_cut_into_runs(capability: int | None, length: int) -> None:
    made = make_linear(gpu_spec(in_features=600, group_size=256, capability=capability))
    x = random_codes(4, 50, 600)
    runs = [slice(at, min(at + length, 600)) for at in range(0, 600, length)]
    sums = [integer_products(x[:, run], made.codes[:, run]) for run in runs]
    steps = made.stored.weight_step[:, [run.start // 256 for run in runs]].to(torch.bfloat16)
    expected = emulate_group_epilogue(sums, steps, torch.ones(1), None)
    assert torch.equal(emulate(made.stored, made.spec, x, None, False), expected)


@pytest.mark.parametrize("dtype", [*SIXTEEN_BITS, torch.float32])
def test_multiply_add_rounds_once(dtype: torch.dtype) -> None:
    # The product lies between two neighbours; addends too small for float64's or float32's last
    # bit decide which is nearer.
    eps = torch.finfo(dtype).eps
    a = torch.tensor([1 + eps, 1 + eps, 1 + eps, -1 - eps, 1.5], dtype=dtype)
    b = torch.tensor([1 - eps / 2, 1.5, 1.5, 1.5, 0.75], dtype=dtype)
    tiny = torch.finfo(dtype).smallest_normal * 4
    for c in (0.0, tiny, -tiny, 1.0, -1.0):
        addend = torch.full_like(a, c)
        rounded = multiply_add(a, b, addend, dtype)
        for i in range(a.numel()):
            exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(addend[i]))
            assert float(rounded[i]) == float(nearest(exact, dtype))


def worst_case(made: MadeLinear) -> Tensor:
    """Activation codes [N, K] that bring each output to its largest sum, nearly."""
    most = 2 ** (made.spec.activation_bits - 1)
    return torch.where(made.codes < 0, -most, most - 1).to(torch.int8)


@pytest.mark.parametrize("k", [64, 1024, 4096, 28672])
@pytest.mark.parametrize(("bits", "activation_bits"), [(4, 4), (3, 4), (4, 8), (8, 8)])
def test_float16_holds_every_static_sum_and_loses_none(
    k: int, bits: int, activation_bits: int
) -> None:
    made = make_linear(
        gpu_spec(
            in_features=k,
            out_features=8,
            weight_bits=bits,
            activation_bits=activation_bits,
            dtype=torch.float16,
        ),
        seed=k,
    )
    shift, bound = power_of_two(made.stored, made.spec), largest_sum(made.stored, made.spec)
    assert bound <= 65504 * 2**shift and (shift == 0 or bound > 65504 * 2 ** (shift - 1))
    assert bound <= k << (bits + activation_bits - 2)
    sums = torch.cat(
        (
            integer_products(worst_case(made), made.codes).flatten(),
            torch.arange(-1000, 1000),
            torch.tensor([bound, -bound]),
        )
    )
    assert int(sums.abs().max()) <= bound
    first = (sums.to(torch.float32) * 2.0**-shift).to(torch.float16)
    assert torch.isfinite(first).all()
    for total, value in zip(sums.tolist(), first.tolist(), strict=True):
        # As if float16 had no largest and no smallest exponent.
        assert Fraction(value) * 2**shift == nearest(Fraction(total), torch.float16, bounded=False)


def test_a_dynamic_float16_sum_overflows_only_with_its_output() -> None:
    made = make_linear(gpu_spec(in_features=64, dtype=torch.float16, dynamic=True))
    codes = made.codes.clone()
    codes[5] = 0
    steps = made.stored.weight_step.clone()
    steps[5] = 2.0**-24  # unused, must not count
    made = make_linear(made.spec, codes=codes)
    stored = dataclasses.replace(made.stored, weight_step=steps)
    shift = power_of_two(stored, made.spec)
    scale = steps * 2.0**shift
    used = torch.arange(128) != 5
    assert 1 <= float(scale[used].min()) < 2
    # A token whose outputs reach float16's upper end.
    x = worst_case(made)
    products = integer_products(x, codes).to(torch.float64)
    exact = products * steps[:, 0].to(torch.float64)
    token = (60000 / exact.abs().amax(dim=1, keepdim=True).clamp(min=2**-10)).to(torch.float32)
    y = emulate(stored, made.spec, x, token, False)
    assert torch.isfinite(y).all() and float(y.abs().max()) > 59000
    # With the whole step on the token's side some sums would not have fitted.
    assert not torch.isfinite((products.to(torch.float32) * token).to(torch.float16)).all()


def test_bfloat16_and_groups_need_no_power_of_two() -> None:
    made = make_linear(gpu_spec(in_features=4096))
    assert power_of_two(made.stored, made.spec) == 0
    made = make_linear(gpu_spec(in_features=4096, dtype=torch.float16, group_size=128))
    assert power_of_two(made.stored, made.spec) == 0


@pytest.mark.parametrize("step", [40000.0, 2.0**-30, 1 + 2.0**-11])
def test_steps_that_float16_cannot_hold_are_refused(step: float) -> None:
    made = make_linear(gpu_spec(in_features=4096, dtype=torch.float16))
    steps = made.stored.weight_step.clone()
    steps[3] = step
    stored = dataclasses.replace(made.stored, weight_step=steps)
    with pytest.raises(ValueError, match=r"weight steps in float16.*--dtype bfloat16"):
        power_of_two(stored, made.spec)

"""Weight grids: the definition group by group, what is stored, and the searched range."""

import math

import pytest
import torch
from torch import Tensor

from mergequant.methods import weights
from mergequant.methods.weights import Search, WeightGrid
from mergequant_vllm.rounding import largest_code, round_to_16_bit, smallest_code
from tests.forms import Form, make_grid

BITS = (3, 4, 8)
SPREADS = [(bits, asymmetric) for bits in BITS for asymmetric in (False, True)]
GROUPS = [None, 7, 32, 1000]
RATIOS = [1 - hundredth / 100 for hundredth in range(81)]


def random_weight(rows: int, columns: int) -> Tensor:
    """Heavy tails, columns of uneven size and a mean that is not 0, as migrated weights are."""
    generator = torch.Generator().manual_seed(1000 * rows + columns)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64) ** 3
    scale = torch.rand(columns, generator=generator, dtype=torch.float64) + 0.1
    return (weight + 0.3) * scale


def slices(columns: int, group_size: int | None) -> list[slice]:
    size = group_size or columns
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


def slow_fit(values: list[float], form: Form, ratio: float = 1.0) -> tuple[float, int]:
    """Step and zero point of one group, straight from the definition."""
    low, high = ratio * min(0.0, *values), ratio * max(0.0, *values)
    extent, steps = max(high, -low), largest_code(form.bits)
    if form.asymmetric:
        extent, steps = high - low, 2**form.bits - 1
    stored = float(round_to_16_bit(torch.tensor(extent / steps, dtype=torch.float64)))
    step = 1.0 if extent == 0 else max(stored, 2.0**-24)
    if not form.asymmetric:
        return step, 0
    return step, min(max(round(-low / step), 0), steps) - 2 ** (form.bits - 1)


def slow_error(values: list[float], step: float, zero: int, bits: int) -> float:
    codes = [
        min(max(round(v / step + zero), smallest_code(bits)), largest_code(bits)) for v in values
    ]
    return math.fsum(((q - zero) * step - v) ** 2 for q, v in zip(codes, values, strict=True))


def zeros_of(grid: WeightGrid) -> Tensor:
    return torch.zeros_like(grid.step) if grid.zero_points is None else grid.zero_points


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("bits", "asymmetric"), SPREADS)
def test_steps_and_zero_points_are_the_definitions(
    bits: int, asymmetric: bool, group_size: int | None, columns: int
) -> None:
    form = Form(bits, group_size, asymmetric)
    weight = random_weight(5, columns)
    grid = make_grid(weight, form)
    parts = slices(columns, group_size)
    expected = [[slow_fit(row[part], form) for part in parts] for row in weight.tolist()]
    steps_and_zeros = torch.tensor(expected, dtype=torch.float64)
    assert torch.equal(grid.step, steps_and_zeros[:, :, 0])
    assert torch.equal(zeros_of(grid).to(torch.float64), steps_and_zeros[:, :, 1])
    assert (grid.zero_points is not None) == asymmetric


def test_steps_are_exact_in_16_bits_and_survive_rows_of_zeros() -> None:
    weight = torch.tensor([[0.0, 0.0], [0.7, -0.35], [1e-9, 0.0]], dtype=torch.float64)
    step = make_grid(weight, Form(4)).step[:, 0]
    assert step[0] == 1.0
    assert step[1] == round_to_16_bit(torch.tensor(0.1, dtype=torch.float64))
    assert step[2] == 2.0**-24


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize(("bits", "asymmetric"), SPREADS)
def test_what_is_stored_is_exact_and_in_range(bits: int, asymmetric: bool, search: str) -> None:
    weight = random_weight(40, 64) * torch.logspace(-12, 6, 40, dtype=torch.float64)[:, None]
    form = Form(bits, 16, asymmetric, "mse" if search == "mse" else "minmax")
    grid = make_grid(weight, form)
    assert grid.step.dtype == weight.dtype and float(grid.step.min()) >= 2.0**-24
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(grid.step.to(dtype).to(torch.float64), grid.step)
    codes = grid.round_weight(weight)
    assert codes.dtype == torch.int8
    for integers in [codes, *([] if grid.zero_points is None else [grid.zero_points])]:
        assert integers.dtype == torch.int8
        assert smallest_code(bits) <= int(integers.min()) <= int(integers.max())
        assert int(integers.max()) <= largest_code(bits)
    assert not grid.dequantize(grid.round_weight(torch.zeros_like(weight))).any()


@pytest.mark.parametrize(("bits", "asymmetric"), SPREADS)
def test_every_code_survives_a_round_trip_and_ties_go_to_the_even_one(
    bits: int, asymmetric: bool
) -> None:
    grid = make_grid(random_weight(4, 2**bits), Form(bits, None, asymmetric))
    codes = torch.arange(smallest_code(bits), largest_code(bits) + 1).repeat(4, 1)
    assert torch.equal(grid.round_weight(grid.dequantize(codes)).to(torch.int64), codes)
    between = grid.dequantize(codes[:, :-1]) + grid.step / 2  # exact: few bits are in use
    assert not (grid.round_weight(between) % 2).any()


@pytest.mark.parametrize(("bits", "asymmetric"), SPREADS)
def test_no_weight_is_further_off_than_rounding_the_step_allows(
    bits: int, asymmetric: bool
) -> None:
    """Half a step, half for the zero point, and the codes that a step stored too short lacks."""
    weight = random_weight(30, 96)
    grid = make_grid(weight, Form(bits, 32, asymmetric))
    error = (grid.dequantize(grid.round_weight(weight)) - weight).abs()
    lost = 2**bits * (2**-9 + 2**-12)  # half a unit in the last place: of bfloat16, of float16
    step, _ = grid.columns(torch.arange(96))
    assert float((error / step).max()) <= (1.0 if asymmetric else 0.5) + lost


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_groups_of_zeros_and_of_one_value(asymmetric: bool, search: str) -> None:
    weight = torch.tensor([0.0, 0.7, -0.7, 1e-30, 1e30], dtype=torch.float64)[:, None].repeat(1, 9)
    form = Form(4, 4, asymmetric, "mse" if search == "mse" else "minmax")
    grid = make_grid(weight, form)
    dequantized = grid.dequantize(grid.round_weight(weight))
    assert grid.step[0].tolist() == [1.0, 1.0, 1.0] and not dequantized[0].any()
    relative = (dequantized[1:3] / weight[1:3] - 1).abs()
    assert float(relative.max()) <= 2**-8  # of the stored step; the value has the last code
    assert not dequantized[3].any()
    assert float(dequantized[4].min()) == float(grid.step[4, 0]) * (15 if asymmetric else 7)


def test_a_short_last_group_is_a_group_and_a_large_one_is_the_channel() -> None:
    weight = random_weight(6, 50)
    for asymmetric in (False, True):
        grid = make_grid(weight, Form(3, 32, asymmetric))
        last = make_grid(weight[:, 32:], Form(3, None, asymmetric))
        assert grid.step.shape == (6, 2)
        assert torch.equal(grid.step[:, 1:], last.step)
        assert torch.equal(zeros_of(grid)[:, 1:], zeros_of(last))
        large = make_grid(weight, Form(3, 64, asymmetric))
        channel = make_grid(weight, Form(3, None, asymmetric))
        assert torch.equal(large.step, channel.step)
        assert torch.equal(large.round_weight(weight), channel.round_weight(weight))


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_padding_changes_nothing_and_has_the_zero_points_code(
    asymmetric: bool, search: str
) -> None:
    form = Form(4, 16, asymmetric, "mse" if search == "mse" else "minmax")
    weight = random_weight(6, 40)
    padded = torch.cat([weight, torch.zeros(6, 24, dtype=torch.float64)], dim=1)
    grid, wide = make_grid(weight, form), make_grid(padded, form)
    assert torch.equal(wide.step[:, :3], grid.step)
    assert torch.equal(zeros_of(wide)[:, :3], zeros_of(grid))
    _, zero = wide.columns(torch.arange(40, 64))
    assert torch.equal(wide.round_weight(padded)[:, 40:].to(torch.float64), zero)


@pytest.mark.parametrize("group_size", GROUPS)
def test_columns_in_any_order_have_their_own_groups_step(group_size: int | None) -> None:
    grid = make_grid(random_weight(3, 40), Form(4, group_size, asymmetric=True))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    step, zero = grid.columns(order)
    for place, column in enumerate(order.tolist()):
        group = column // (group_size or 40)
        assert torch.equal(step[:, place], grid.step[:, group])
        assert torch.equal(zero[:, place], zeros_of(grid)[:, group].to(torch.float64))


@pytest.mark.parametrize("group_size", [None, 24])
@pytest.mark.parametrize(("bits", "asymmetric"), SPREADS)
def test_no_third_hundredth_and_no_neighbour_is_better_than_what_the_search_finds(
    bits: int, asymmetric: bool, group_size: int | None
) -> None:
    weight = random_weight(4, 40)
    form = Form(bits, group_size, asymmetric, "mse")
    grid = make_grid(weight, form)
    # Ratios are compared in float32: a code's fraction is off by 2^(b-24), an error by as much.
    close = 1 + 2.0 ** (bits - 20)
    for row, values in enumerate(weight.tolist()):
        for group, part in enumerate(slices(40, group_size)):
            fit = float(grid.step[row, group]), int(zeros_of(grid)[row, group])
            error = slow_error(values[part], *fit, bits)
            fits = [slow_fit(values[part], form, ratio) for ratio in RATIOS]
            tried = [slow_error(values[part], *each, bits) for each in fits]
            place = fits.index(fit)
            neighbours = tried[max(0, place - 1) : place + 2]
            assert error <= close * min(tried[::3] + neighbours)
            assert error <= tried[0] * (1 + 1e-12)  # sums of 40 float64 numbers


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_search_pays_at_3_bits_and_goes_by_any_number_of_rows(
    asymmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(20, 128)
    full = make_grid(weight, Form(3, None, asymmetric))
    form = Form(3, None, asymmetric, "mse")
    searched = make_grid(weight, form)
    squares = [
        float((grid.dequantize(grid.round_weight(weight)) - weight).square().sum())
        for grid in (full, searched)
    ]
    assert squares[1] < squares[0]
    for elements in (1, 7 * 128):
        monkeypatch.setattr(weights, "_ELEMENTS_AT_ONCE", elements)
        again = make_grid(weight, form)
        assert torch.equal(again.step, searched.step)
        assert torch.equal(zeros_of(again), zeros_of(searched))


def test_a_ratio_that_is_worse_in_the_weights_dtype_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = random_weight(6, 64)
    full = make_grid(weight, Form(8))
    monkeypatch.setattr(weights, "_best_ratio", lambda _, low, *rest: torch.full_like(low, 0.2))
    assert torch.equal(make_grid(weight, Form(8, search="mse")).step, full.step)


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize(("bits", "asymmetric"), SPREADS)
def test_each_segment_is_rounded_as_a_weight_of_its_own(
    bits: int, asymmetric: bool, search: Search
) -> None:
    weight, lengths = random_weight(7, 109), (32, 64, 13)
    grid = make_grid(weight, Form(bits, None, asymmetric, search, lengths))
    parts = [make_grid(x, Form(bits, None, asymmetric, search)) for x in weight.split(lengths, 1)]
    assert grid.runs == lengths
    assert torch.equal(grid.step, torch.cat([part.step for part in parts], dim=1))
    codes = [part.round_weight(x) for part, x in zip(parts, weight.split(lengths, 1), strict=True)]
    assert torch.equal(grid.round_weight(weight), torch.cat(codes, dim=1))
    order = torch.randperm(109, generator=torch.Generator().manual_seed(0))
    step, _ = grid.columns(order)
    whole, _ = grid.columns(torch.arange(109))
    assert torch.equal(step, whole[:, order])

"""Part `linear` on a small linear: every baseline computes the same product; its table shows it."""

from dataclasses import replace

import pytest
import torch

from benchmarks.common.random_linears import make_codes
from benchmarks.common.shapes import Linear
from benchmarks.cpu.linear import baselines
from benchmarks.cpu.linear import measure as linear
from benchmarks.cpu.linear import table as linear_table
from benchmarks.cpu.linear.limits import Limits

SHAPE = Linear("down", 64, 256, True)
PLAN = linear.Plan("cpu-fp32", ("tiny",), (1, 3), 2, 2**16)


@pytest.mark.parametrize("name", baselines.BASELINES)
@pytest.mark.parametrize("m", [1, 5])
def test_every_baseline_computes_the_product_of_the_codes(name: str, m: int) -> None:
    if name == baselines.ONEDNN:
        pytest.importorskip("vllm", reason="vLLM is not installed")
    if name == baselines.AUTO_ROUND:
        pytest.importorskip("auto_round_kernel", reason="auto-round-lib is not installed")
    generator = torch.Generator().manual_seed(m)
    weight = make_codes((SHAPE.n, SHAPE.k), 4, "random", generator)
    codes = make_codes((m, SHAPE.k), 4, "random", generator)
    exact = codes.to(torch.float32) @ weight.to(torch.float32).t()
    baseline = baselines.BASELINES[name]
    multiply = baseline.make(weight)
    weight.zero_()  # it keeps weights of its own
    linear.check_product(name, multiply(baseline.inputs(codes)), exact)


def test_a_wrong_result_is_recorded_as_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    right = baselines.BASELINES[baselines.FLOAT32]
    wrong = replace(right, make=lambda codes: right.make(codes + 1))
    monkeypatch.setattr(baselines, "BASELINES", {baselines.FLOAT32: wrong})
    monkeypatch.setattr(linear, "BASELINES", baselines.BASELINES)
    row = linear.measure_shape(PLAN, "a down", SHAPE)[0]
    assert "its result is wrong by" in row["subjects"][baselines.FLOAT32]["failed"]
    assert row["subjects"][linear.OURS]["seconds"]


def test_a_shape_is_measured_and_tabulated(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: baselines.BASELINES[name] for name in (baselines.FLOAT32, baselines.INT8)}
    monkeypatch.setattr(linear, "BASELINES", few)
    rows = linear.measure_shape(PLAN, "a down", SHAPE)
    assert [row["m"] for row in rows] == [1, 3]
    for row in rows:
        times = {name: result["seconds"] for name, result in row["subjects"].items()}
        assert set(times) == {linear.OURS, *few, linear.QUANTIZE, linear.ROTATE}
        assert all(len(seconds) == 2 for seconds in times.values())
    # float32 has 65536 bytes of weights, which is what was asked for; int8 a quarter.
    copies = {name: rows[0]["subjects"][name]["copies"] for name in few}
    assert copies == {baselines.FLOAT32: 1, baselines.INT8: 4}
    # The kernel in our place holds float32 weights and a step for each of 64 outputs.
    assert rows[0]["packed_bytes"] == 4 * SHAPE.n * (SHAPE.k + 1)


def row_of(ours: list[float], theirs: list[float]) -> dict[str, object]:
    subjects = {
        linear.OURS: {"seconds": ours},
        baselines.FLOAT32: {"seconds": theirs},
        baselines.INT8: {"refused": "it needs AMX"},
        linear.QUANTIZE: {"seconds": [seconds / 10 for seconds in ours]},
        linear.ROTATE: {"failed": "Error: no"},
    }
    base = {"title": "a down", "n": 100, "k": 1000, "m": 10, "dynamic": True}
    return {**base, "packed_bytes": 50_000, "subjects": subjects}


def test_the_table_shows_losses_like_wins() -> None:
    # 1e6 products in 1 ms are 1 G/s; bound: 1 GB/s / 50 kB * 1e6 = 20 G/s, or 2 G/s.
    limits = Limits(bandwidth=1e9, float32=1e9, codes=2e9, clock=1e9)
    rows = [row_of([1e-3, 1e-3], [2e-3, 4e-3]), row_of([1e-3, 1e-3], [0.5e-3, 0.5e-3])]
    text = linear_table.table("a-kernel", "avx2", limits, 2**20, rows)
    assert "| 10 | torch float32 | 1 of 2 | 0.50 | 1.75 | 3.00 | 0.50 | 1.25 | 2.00 |" in text
    assert "| a down 100x1000 | 10 | 2.0 | 50% | 1.0 | 0.3 | - | - | - | - |" in text
    assert "| a down 100x1000 | 10 | 3.00 (2.50-3.50), 2.00 | - | - | - | - |" in text
    assert "| a down 100x1000 | 10 | 0.50 (0.50-0.50), 0.50 | - | - | - | - |" in text
    assert "| a down 100x1000 | 10 | 10.0% | - |" in text
    assert "- REFUSED torch int8, a down 100x1000: it needs AMX" in text
    assert "vpmaddubsw" in text and "clock of 1.00 GHz" in text
    unknown = linear_table.limits_text(Limits(1e9, 1e9, None, None))
    assert unknown.endswith("no bound of arithmetic is known for this instruction set.")


@pytest.mark.parametrize(("k", "block"), [(11008, 256), (5632, 256), (96, 32), (129, 1)])
def test_the_rotation_has_the_largest_block_that_fits(k: int, block: int) -> None:
    assert linear.rotation_block(k) == block

"""Times on CPUs: turns, copies, ratios within a round; what a machine can do at most."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks.common.result_cells import Refused
from benchmarks.cpu import machine
from benchmarks.cpu.linear import limits, timing


class Clock:
    """A clock that calls move on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.called = 0.0, list[str]()
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name: str, seconds: float) -> Callable[[], str]:
        def run() -> str:
            self.now += seconds
            self.called.append(name)
            return name

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_every_round_begins_with_another_subject_and_goes_on_with_the_copies(clock: Clock) -> None:
    def copies(name: str, seconds: float) -> Callable[[], Sequence[timing.Call]]:
        return lambda: [clock.call(f"{name}{number}", seconds) for number in range(3)]

    results = timing.compare({"a": copies("a", 0.5), "b": copies("b", 0.25)}, round_seconds=0.5)
    assert results["a"] == {"seconds": [0.5] * 9, "copies": 3}
    assert results["b"]["seconds"] == [0.25] * 9
    # Preparing: once to check, every copy once, once to plan; b then runs twice in a round.
    assert clock.called[:9] == ["a0", "a0", "a1", "a2", "b0", "b0", "b1", "b2", "a0"]
    assert clock.called[9:17] == ["b0", "b1", "b2", "b0", "a1", "a2", "b1", "b2"]


def test_what_is_slow_takes_part_in_fewer_rounds(clock: Clock) -> None:
    calls = [clock.call("slow", 8.0), clock.call("never", 8.0)]
    results = timing.compare({"slow": lambda: calls[:1], "x": lambda: [clock.call("x", 1e-3)]})
    assert results["slow"]["seconds"] == [8.0, 8.0] and len(results["x"]["seconds"]) == 9
    assert timing.compare({"slow": lambda: calls}, rounds=1)["slow"]["seconds"] == [8.0]


def test_refusals_failures_and_wrong_results_are_recorded(clock: Clock) -> None:
    def refuse() -> Sequence[timing.Call]:
        raise Refused("it needs something")

    def check(name: str, result: object) -> None:
        if result != "right":
            raise RuntimeError("its result is wrong")

    subjects = {
        "refuses": refuse,
        "wrong": lambda: [clock.call("wrong", 1.0)],
        "right": lambda: [clock.call("right", 1.0)],
    }
    results = timing.compare(subjects, rounds=2, check=check)
    assert results["refuses"] == {"refused": "it needs something"}
    assert results["wrong"] == {"failed": "RuntimeError: its result is wrong"}
    assert results["right"]["seconds"] == [1.0, 1.0]


def test_a_ratio_is_formed_within_a_round() -> None:
    # The machine slows down by 4 in the third round: the ratio does not see it.
    assert timing.ratio([1.0, 1.0, 4.0], [2.0, 2.0, 8.0]) == (2.0, 2.0, 2.0)
    assert timing.ratio([1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)
    assert timing.ratio([1.0, 1.0], [3.0]) == (3.0, 3.0, 3.0)


def test_bounds_follow_from_bandwidth_and_clock() -> None:
    # 2 cores of 2 GHz: AVX2 does 16 float32 products a cycle, of which 95% are measured.
    derived = limits.derive("avx2", 10e9, 0.95 * 16 * 2e9 * 2, 2)
    assert derived.clock == pytest.approx(2e9) and derived.codes == pytest.approx(48 * 2e9 * 2)
    products = 1000 * 1000
    assert derived.bound(products, products // 2) == pytest.approx(20e9)
    assert derived.bound(512 * products, products // 2) == pytest.approx(192e9)
    unknown = limits.derive("portable", 10e9, 1e9, 1)
    assert unknown.codes is None and unknown.bound(8 * products, products // 2) == 160e9


def test_limits_are_measured() -> None:
    measured = limits.measure_limits("avx512-vnni", 2**18, tries=1)
    assert (
        measured.bandwidth > 1e7
        and measured.float32 > 1e7
        and measured.codes == pytest.approx(measured.float32 / 0.95 / 32 * 128)
    )


def test_the_machine_is_read_from_its_files(tmp_path: Path) -> None:
    for number, size in enumerate(("48K", "2048K", "107520K")):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        (folder / "size").write_text(f"{size}\n")
    assert machine.cache_bytes(tmp_path) == 105 * 2**20
    assert machine.cache_bytes(tmp_path / "none") == machine.UNKNOWN_CACHE
    assert machine.cpu_name("processor\t: 0\nmodel name\t: A CPU: fast\n") == "A CPU: fast"
    assert machine.cpu_name("") == "unknown CPU"
    assert machine.status_bytes("VmRSS") > 2**20
    with pytest.raises(RuntimeError, match="has no VmNothing"):
        machine.status_bytes("VmNothing")

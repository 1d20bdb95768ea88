"""Cells: what is done stays done, failures are tried again, a dead device is not touched twice."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.child_cells import run_child
from benchmarks.common.device import Device, stamp
from benchmarks.common.result_cells import (
    Cells,
    DeadDeviceError,
    OutOfTime,
    Refused,
    SubjectDiedError,
)
from benchmarks.gpu.__main__ import GRACE, main
from benchmarks.gpu.timing import compare, summary

CPU = Device("cpu", "a CPU", None, 0, None)


def make_cells(folder: Path, run: str = "1", **changes: Any) -> Cells:
    arguments = {"stamp": "new", "end": time.time() + 60, "again": False, **changes}
    cells = Cells(folder / "part.json", {"device": "a GPU"}, run=run, **arguments)
    cells.record_interrupted()
    return cells


def refuse() -> dict[str, Any]:
    raise Refused("it needs more memory")


def fail() -> dict[str, Any]:
    raise ValueError("wrong\nsecond line")


def test_a_finished_cell_is_on_disk_at_once_and_not_measured_again(tmp_path: Path) -> None:
    cells = make_cells(tmp_path)
    cells.measure("a", lambda: {"us": 1})
    assert json.loads((tmp_path / "part.json").read_text())["cells"]["a"]["us"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part.json"]
    later = make_cells(tmp_path, run="2")
    later.measure("a", fail)
    assert later.computed == 0 and later.done["a"]["us"] == 1


def test_other_versions_and_again_measure_anew(tmp_path: Path) -> None:
    make_cells(tmp_path).measure("a", lambda: {"us": 1})
    assert make_cells(tmp_path, run="2", stamp="other").pending(["a"]) == ["a"]
    again = make_cells(tmp_path, run="2", again=True)
    again.measure("a", lambda: {"us": 2})
    assert again.done["a"]["us"] == 2
    # A restart within the same run does not begin from the front.
    assert make_cells(tmp_path, run="2", again=True).pending(["a"]) == []


def test_cells_of_others_do_not_depend_on_our_sources(tmp_path: Path) -> None:
    changes = {"foreign": lambda key: key == "bf16", "foreign_stamp": "versions"}
    make_cells(tmp_path, **changes).measure("bf16", lambda: {"us": 1})
    assert make_cells(tmp_path, run="2", stamp="edited", **changes).pending(["bf16"]) == []


def test_refusals_and_failures_are_recorded(tmp_path: Path) -> None:
    cells = make_cells(tmp_path)
    cells.measure("a", refuse)
    cells.measure("b", fail)
    cells.measure("c", lambda: {"us": 1})
    assert cells.done["a"]["refused"] == "it needs more memory"
    assert cells.done["b"]["failed"] == "ValueError: wrong"
    assert list(cells.records()) == ["c"]
    assert cells.troubles() == [
        "- REFUSED a: it needs more memory",
        "- FAILED b: ValueError: wrong",
    ]
    # The next run tries failures again, after what was never tried; refusals stand.
    assert make_cells(tmp_path, run="2").pending("abcd") == ["d", "b"]
    assert make_cells(tmp_path).pending("abcd") == ["d"]


def test_nothing_is_begun_after_the_end(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, end=time.time() - 1)
    with pytest.raises(OutOfTime):
        cells.measure("a", lambda: {"us": 1})
    assert cells.done == {}


def test_a_dead_device_ends_the_process_and_its_subject_is_left_out(tmp_path: Path) -> None:
    def die() -> None:
        raise RuntimeError("CUDA error")

    cells = make_cells(tmp_path)
    with pytest.raises(DeadDeviceError, match="CUDA error"):
        cells.measure("a", fail, alive=die)
    assert cells.done["a"]["failed"] == "ValueError: wrong"

    def compute() -> dict[str, Any]:
        raise SubjectDiedError("triton", RuntimeError("illegal access"))

    with pytest.raises(DeadDeviceError):
        cells.measure("b", compute)
    restarted = make_cells(tmp_path)
    assert restarted.pending("ab") == ["b"]
    assert restarted.dead("b") == {"triton": "RuntimeError: illegal access"}
    assert make_cells(tmp_path, run="2").dead("b") == {}


def test_a_cell_that_killed_its_process_is_recorded_as_failed(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    cells = make_cells(tmp_path)
    (tmp_path / "part.running").write_text(json.dumps(["a", "1"]))
    restarted = make_cells(tmp_path)
    assert "died" in restarted.done["a"]["failed"]
    assert restarted.pending("ab") == ["b"] and make_cells(tmp_path, run="2").pending("a") == ["a"]
    assert cells.done == {}


def test_the_stamp_is_of_device_versions_and_sources(tmp_path: Path) -> None:
    source = tmp_path / "kernel.py"
    source.write_text("1")
    place = {"date": "today", "device": "a", "driver": None, "versions": {"torch": "2"}}
    before = stamp(place, (source,))
    assert stamp({**place, "date": "tomorrow"}, (source,)) == before
    assert stamp({**place, "versions": {"torch": "3"}}, (source,)) != before
    source.write_text("2")
    assert stamp(place, (source,)) != before


def test_subjects_are_compared_and_their_failures_recorded() -> None:
    ran: list[str] = []
    subjects = {
        "first": lambda: [lambda: ran.append("first")],
        "second": lambda: [lambda: ran.append("second"), lambda: ran.append("second")],
        "refused": lambda: refuse() and [],
        "failed": lambda: fail() and [],
        "dead": lambda: [lambda: ran.append("dead")],
    }
    results = compare(subjects, CPU, rounds=3, round_seconds=0, dead={"dead": "it died"})
    assert list(results) == list(subjects)
    assert results["first"]["timer"] == "clock" and results["first"]["rounds"] == 3
    assert results["first"]["low"] <= results["first"]["us"] <= results["first"]["high"]
    assert results["refused"] == {"refused": "it needs more memory"}
    assert (
        results["failed"] == {"failed": "ValueError: wrong"}
        and results["dead"]["failed"] == "it died"
    )
    # Each round begins with another one.
    rounds = ("first", "second second", "second second", "first", "first", "second second")
    assert ran[2:] == " ".join(rounds).split()
    assert summary([3.0, 1.0, 2.0]) == {"us": 2.0, "low": 1.0, "high": 3.0, "rounds": 3}


CHILD = """
import sys, time
print('CELL 1 {"us": 1}', flush=True)
if sys.argv[1] == "hang":
    time.sleep(60)
raise SystemExit(f"ValueError: {sys.argv[1]}" if sys.argv[1] != "well" else 0)
"""


@pytest.mark.parametrize(
    ("behaviour", "fault"),
    [("well", None), ("badly", "exit status 1: ValueError: badly"), ("hang", "stopped after 3 s")],
)
def test_children_hand_over_their_cells_before_they_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str, fault: str | None
) -> None:
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cells: dict[str, Any] = {}
    log = tmp_path / "child.log"
    reported = run_child("a_child", [behaviour], cells.__setitem__, 3.0, log)
    assert cells == {"1": {"us": 1}} and "CELL 1" in log.read_text()
    assert reported == fault or (
        fault is not None and reported is not None and reported.startswith(fault)
    )


def test_a_part_goes_on_in_a_new_process_when_its_own_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses = [75, -11, 1]
    commands: list[list[str]] = []

    def run(command: list[str], **arguments: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        assert arguments["timeout"] <= 60 + GRACE
        return subprocess.CompletedProcess(command, statuses.pop(0))

    monkeypatch.setattr(subprocess, "run", run)
    arguments = ["exact", "--minutes", "1", "--results", str(tmp_path), "--kernels", "triton"]
    assert main(arguments) == 1
    # The same run, so that what killed a process is left alone.
    assert len(commands) == 3 and commands[0] == commands[1] == commands[2]
    assert commands[0][3:7] == ["exact", "--minutes", "1", "--results"]
    assert "--worker" in commands[0] and "its process died (-11)" in capsys.readouterr().out

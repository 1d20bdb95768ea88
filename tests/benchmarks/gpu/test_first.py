"""The first minutes on a GPU: each way in which a step can break, and what the others do then."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.gpu import differing_codes, first
from benchmarks.gpu.first import STEPS, Outcome, Step, in_order, main, run_all, run_step
from mergequant_vllm.packing import pack

SCRIPTS = {
    "import error": "import no_such_module",
    "wrong result": "print('kernel triton differs'); raise SystemExit(1)",
    "hang": "import time; print('waiting', flush=True); time.sleep(600)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "out of memory": "bytearray(2**62)",
}
ENDS = {
    "import error": ("failed", "No module named 'no_such_module'"),
    "wrong result": ("failed", "exit status 1: kernel triton differs"),
    "hang": ("timed out", "after 3 s; last: waiting"),
    "killed": ("killed", "by SIGKILL (out of memory?)"),
    "out of memory": ("failed", "MemoryError"),
}


def step(name: str, script: str, folder: Path, seconds: float = 60) -> Step:
    file = folder / f"{name.replace(' ', '_')}.py"
    file.write_text(script)
    return Step(name, f"Does {name} end?", f"{{python}} {file}", seconds)


@pytest.mark.parametrize("broken", SCRIPTS)
def test_what_breaks_is_written_down_and_the_others_run(tmp_path: Path, broken: str) -> None:
    steps = [
        step("before", "print('first figure')", tmp_path),
        step(broken, SCRIPTS[broken], tmp_path, seconds=3),
        step("after", "print('last figure')", tmp_path),
    ]
    outcomes = run_all(steps, {}, tmp_path, minutes=2)
    status, message = ENDS[broken]
    assert outcomes[broken].status == status and message in outcomes[broken].message
    for name, figure in (("before", "first figure"), ("after", "last figure")):
        assert (outcomes[name].status, outcomes[name].message) == ("done", figure)
    table = (tmp_path / "first.md").read_text()
    assert f"| {broken} | Does {broken} end? | {status} |" in table and "last figure" in table


def test_nothing_that_a_step_started_outlives_it(tmp_path: Path) -> None:
    script = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
    command = first.filled(step("hang", script, tmp_path), {}, 3)
    assert isinstance(command, list)
    log = tmp_path / "hang.log"
    assert run_step("hang", command, 3, log).status == "timed out"
    pid = int(log.read_text())
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return  # dead, and not yet collected by whoever inherited it
        time.sleep(0.1)
    pytest.fail("the child lives")


def test_a_second_command_begins_with_what_broke_and_keeps_the_rest(tmp_path: Path) -> None:
    flag = tmp_path / "mended"
    broken = f"from pathlib import Path; assert Path({str(flag)!r}).exists(), 'not yet'"
    log = f"open({str(tmp_path / 'runs')!r}, 'a').write('done once ')"
    steps = [step("done", log, tmp_path), step("broken", broken, tmp_path)]
    assert run_all(steps, {}, tmp_path, minutes=1)["broken"].message.endswith("not yet")
    flag.touch()
    outcomes = run_all(steps, {}, tmp_path, minutes=1)
    assert [x.status for x in outcomes.values()] == ["done", "done"]
    assert (tmp_path / "runs").read_text() == "done once "


def test_what_broke_comes_first_then_what_never_ran() -> None:
    steps = [Step(name, "", "", 1) for name in "abcd"]
    known = {"a": Outcome("a", "done"), "c": Outcome("c", "no time")}
    assert [x.name for x in in_order(steps, known)] == ["c", "b", "d"]


def test_a_step_without_its_file_or_without_time_says_so(tmp_path: Path) -> None:
    steps = [
        Step("quantize", "", "{python} {model} {calibration}", 60),
        step("late", "print(1)", tmp_path),
    ]
    given = {"model": None, "calibration": None}
    outcomes = run_all(steps, given, tmp_path, minutes=0)
    assert outcomes["quantize"] == Outcome(
        "quantize", "left out", "needs --model and --calibration"
    )
    assert outcomes["late"].status == "no time"


def test_a_command_that_does_not_exist_is_a_failure(tmp_path: Path) -> None:
    outcome = run_step("none", [str(tmp_path / "none")], 5, tmp_path / "log")
    assert outcome.status == "failed" and "No such file" in outcome.message


def test_every_step_is_a_command_of_this_project() -> None:
    """Options that the parts do not know would cost a GPU's minutes."""
    from benchmarks.gpu.__main__ import make_parser

    files = {name: name for name in ("model", "checkpoint", "text", "calibration")}
    for one in STEPS:
        command = first.filled(one, {**files, "results": "r", "scratch": "s"}, one.seconds)
        assert isinstance(command, list)
        if "benchmarks.gpu" in command:
            options = make_parser().parse_args(command[3:])
            assert 60 * options.minutes < one.seconds
    assert len({one.name for one in STEPS}) == len(STEPS)


def test_the_command_says_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = step("imports", "print('vllm loads')", tmp_path)
    needs = Step("quantize", "", "{python} {model}", 60)
    monkeypatch.setattr(first, "STEPS", (good, needs))
    assert main(["--results", str(tmp_path), "--minutes", "1"]) == 0
    said = capsys.readouterr().out
    assert "vllm loads" in said and "needs --model" in said
    assert "1 of 1 steps ended well" in said
    (record,) = tmp_path.glob("*/first.json")
    assert [x["status"] for x in json.loads(record.read_text())["steps"]] == ["done", "left out"]


def packed_checkpoint(folder: Path, **codes: torch.Tensor) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {f"{name}.weight_packed": pack(x, 4) for name, x in codes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_differing_codes_are_counted(tmp_path: Path) -> None:
    codes = torch.randint(-8, 8, (6, 32), generator=torch.Generator().manual_seed(0))
    codes = codes.to(torch.int8)
    other = codes.clone()
    other[0, :3] = -1 - codes[0, :3]
    a = packed_checkpoint(tmp_path / "a", q=codes, k=codes)
    b = packed_checkpoint(tmp_path / "b", q=codes, k=other)
    assert differing_codes.count(a, b) == (3, 2 * codes.numel())
    c = packed_checkpoint(tmp_path / "c", q=codes)
    with pytest.raises(SystemExit, match=r"Only one of the two has k\.weight_packed"):
        differing_codes.count(a, c)

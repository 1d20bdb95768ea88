"""The first minutes on a GPU, rehearsed: every step's own command, on a CPU and at tiny sizes."""

import json
import shlex
from pathlib import Path

import pytest

from benchmarks.gpu import first
from mergequant.cli import app
from tests.tiny import TEXT, make_model


def test_every_step_ends_well_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "model", blocks=1, intermediate=192)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    checkpoint = tmp_path / "checkpoint"
    quantize = ["quantize", str(model), str(checkpoint), "--calibration", str(text)]
    app([*quantize, "--quiet", *shlex.split(first.REHEARSED["quantized"])], standalone_mode=False)
    files = {"model": model, "checkpoint": checkpoint, "text": text, "calibration": text}
    given = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    status = first.main([*given, "--results", str(tmp_path / "results"), "--rehearse"])
    (record,) = (tmp_path / "results").glob("*/first.json")
    ended = {x["step"]: x["status"] for x in json.loads(record.read_text())["steps"]}
    assert ended == {step.name: "done" for step in first.STEPS}, capsys.readouterr().out
    assert status == 0
    assert "0 of" in capsys.readouterr().out  # codes: the same machine quantized both


def test_a_rehearsal_does_not_write_among_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        first.main(["--rehearse"])
    assert "give --results a folder of its own" in capsys.readouterr().err

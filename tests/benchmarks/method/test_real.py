"""The yardstick of a pretrained model: rows are kept, in order, and compared with the first."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.record import RESULTS
from benchmarks.method import real
from benchmarks.method.model_rows import FULL, known, measure_all, with_excess
from benchmarks.method.peers import __main__ as peers
from benchmarks.method.real import ROWS, Row
from mergequant import Options
from mergequant.evaluate.checkpoint_contents import inspect_checkpoint
from tests.tiny import make_model


@pytest.mark.parametrize("name", [name for name in ROWS if name != FULL])
def test_each_row_is_options_that_quantize_takes(name: str) -> None:
    changes = ROWS[name]
    assert changes is not None
    Options.model_validate(changes)


def test_rows_of_the_same_command_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "real.json"
    assert known(file, "command", Row) == []
    rows = [Row(FULL, {"text": 1.0})]
    file.write_text(json.dumps({"command": "command", "rows": [vars(row) for row in rows]}))
    assert known(file, "command", Row) == rows and known(file, "another", Row) == []


def test_rows_stand_in_their_order_with_their_loss_above_full_precision() -> None:
    rows = with_excess([Row("W4A4", {"text": 1.5}), Row(FULL, {"text": 1.0})], ROWS)
    assert [row.name for row in rows] == [FULL, "W4A4"]
    assert [row.excess["text"] for row in rows] == [0.0, 0.5]
    assert "| W4A4 | +0.5000 |" in real.table(rows)


def test_a_row_is_quantized_in_the_way_that_the_child_is_told(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(tmp_path / "model", "llama")
    few = {"statistics_samples": 4, "gptq_samples": 8, "sequence_length": 64}
    changes = {**few, "compensation_rank": 0, "reconstruction": "none", "weight_bits": 8}
    real.quantize_row(model, tmp_path / "out", json.dumps(changes), [text])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["seconds"] > 0 and told["peak_gib"] > 0
    assert inspect_checkpoint(tmp_path / "out")
    options = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert options["provenance"]["options"]["rotation"] in ("online", "none")


def test_a_text_named_later_is_a_column_of_its_own_and_asks_for_full_precision_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.method.model_rows.RESULTS", tmp_path)
    measured = []

    def run(command: str, texts: list[str], wanted: list[str]) -> str:
        def measure(name: str) -> Row:
            measured.append(name)
            return Row(name, dict.fromkeys(texts, 1.0 + (name != FULL)))

        measure_all("real", command, wanted, set(texts), ROWS, Row, measure, real.table)
        return (tmp_path / "real.md").read_text()

    run("real --text a.txt", ["a"], ["W4A4"])
    told = run("real --text a.txt b.txt", ["a", "b"], ["W4A4", "W4A8"])
    assert measured == [FULL, "W4A4", FULL, "W4A8"]
    assert "| W4A4 | +1.0000 | - |" in told and "| W4A8 | +1.0000 | +1.0000 |" in told
    with pytest.raises(SystemExit, match="have b: name these files too"):
        run("real --text a.txt", ["a"], ["W4A4"])


def test_accuracy_stands_beside_its_standard_error() -> None:
    full = Row(FULL, {"text": 1.0}, accuracy={"piqa": (66.0, 2.1)})
    rows = with_excess([full, Row("W4A4", {"text": 1.5})], ROWS)
    assert "| full precision | +0.0000 | 66.0 ± 2.1 |" in real.table(rows)
    assert "| W4A4 | +0.5000 | - |" in real.table(rows)


@pytest.mark.parametrize("benchmark", [real, peers], ids=["real", "peers"])
def test_a_command_written_beside_figures_is_the_one_that_is_run_today(benchmark: Any) -> None:
    name = benchmark.__package__.split(".")[-1] if benchmark is peers else "real"
    record = json.loads((RESULTS / f"{name}-SmolLM2-135M.json").read_text())
    words = record["command"].split()[3:]
    needed = ["--environments", "."] if benchmark is peers else []
    assert benchmark.command(benchmark.parser().parse_args([*words, *needed])) == record["command"]

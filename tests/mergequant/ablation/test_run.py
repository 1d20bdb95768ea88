"""The command, with a quantizer that only copies: what runs, what is kept, what is shared."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mergequant.ablation import measure, study
from mergequant.ablation.records import Record
from mergequant.model.reader import CONFIG
from tests.mergequant.ablation.conftest import BASE, Model, Quantizer, run


def rows(output: Path) -> set[str]:
    return {path.stem for path in (output / "rows").glob("*.json")}


def test_every_row_of_every_table_runs_once(
    quantizer: Quantizer, llama: Path, text: Path, tmp_path: Path
) -> None:
    done = run(llama, tmp_path / "out", text)
    asked = [(x.model_dump_json(), None) for x in quantizer.exported]
    made = zip(quantizer.in_memory, quantizer.baselines, strict=True)
    asked += [(options.model_dump_json(), baseline) for options, baseline in made]
    assert len(asked) == len(set(asked)) == 24
    assert not any(baseline.exported for baseline in quantizer.baselines)
    assert not done.failed and "not run" not in done.markdown
    assert (tmp_path / "out" / "ablation.md").read_text() == done.markdown
    assert len(json.loads((tmp_path / "out" / "ablation.json").read_text())["tables"]) == 4
    for name in ("Table 1", "Table 4", "Table 5", "Table 7", "Table 8"):
        assert f"## {name}" in done.markdown
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


def test_a_row_sums_up_its_report(
    quantizer: Quantizer, llama: Path, text: Path, tmp_path: Path
) -> None:
    run(llama, tmp_path / "out", text, "table4")
    key = "static-channel.gptq.prune.clip-adaptive.compensated"
    record = Record.model_validate_json((tmp_path / "out" / "rows" / f"{key}.json").read_bytes())
    assert record.growth == 25.0  # 80 columns of 64 channels
    assert record.clips == {"mlp.down_proj": [0.7, 0.6]}
    assert (record.seconds["calibration"], record.seconds["codes"]) == (4.0, 12.0)
    full = json.loads((tmp_path / "out" / "rows" / "full.json").read_text())
    assert (
        record.measured["transformers"]["text"].loss
        == (full["measured"]["transformers"]["text"]["loss"])
    )


def test_finished_rows_are_not_repeated_and_tables_add_up(
    quantizer: Quantizer, llama: Path, text: Path, tmp_path: Path
) -> None:
    run(llama, tmp_path / "out", text, "table7")
    assert len(quantizer.in_memory) == 3 and not quantizer.exported
    first = run(llama, tmp_path / "out", text, "table7", "table1")
    assert len(quantizer.in_memory) == 4 and len(quantizer.exported) == 6
    again = run(llama, tmp_path / "out", text, "table7", "table1")
    assert len(quantizer.in_memory) == 4 and len(quantizer.exported) == 6
    assert again.markdown == first.markdown


def test_an_interrupted_run_goes_on_where_it_stopped(
    quantizer: Quantizer, llama: Path, text: Path, tmp_path: Path
) -> None:
    quantizer.fails = {"none": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "out", text, "table4")
    finished, asked = rows(tmp_path / "out"), len(quantizer.exported)
    assert len(finished) == 9 and asked == 5  # the rotated half, two in memory, full precision
    assert "not run" in (tmp_path / "out" / "ablation.md").read_text()
    half = tmp_path / "out" / "checkpoints" / "static-channel.gptq" / "half"
    assert half.exists()  # the quantizer's own finished blocks would be here
    quantizer.fails = {}
    run(llama, tmp_path / "out", text, "table4")
    assert len(quantizer.exported) == asked + 4
    assert len(rows(tmp_path / "out")) == 13


def test_a_finished_checkpoint_is_measured_and_not_made_again(
    quantizer: Quantizer,
    llama: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(measure.Bench, "folder", _only_full(measure.Bench.folder))
        with pytest.raises(KeyboardInterrupt):
            run(llama, tmp_path / "out", text, "table1")
    assert len(quantizer.exported) == 1
    run(llama, tmp_path / "out", text, "table1")
    assert len(quantizer.exported) == 6
    assert [x.weights for x in quantizer.exported].count("rtn") == 1


def _only_full(folder: Any) -> Any:
    def measured(bench: measure.Bench, path: Path, engines: Sequence[str]) -> Any:
        if "checkpoints" in path.parts:
            raise KeyboardInterrupt
        return folder(bench, path, engines)

    return measured


def test_a_row_of_other_options_is_made_again_and_its_remains_removed(
    quantizer: Quantizer, llama: Path, text: Path, tmp_path: Path
) -> None:
    run(llama, tmp_path / "out", text, "table1", keep=True)
    kept = tmp_path / "out" / "checkpoints"
    assert len([path for path in kept.iterdir() if (path / CONFIG).exists()]) == 6
    (kept / "dynamic.rtn" / "stale").touch()
    count = len(quantizer.exported)
    run(llama, tmp_path / "out", text, "table1", base=BASE.model_copy(update={"seed": 1}))
    assert len(quantizer.exported) == 2 * count
    assert not list(kept.iterdir())


def test_a_row_that_fails_leaves_the_others(
    quantizer: Quantizer, llama: Path, text: Path, tmp_path: Path
) -> None:
    quantizer.fails = {"offline": RuntimeError("out of memory")}
    done = run(llama, tmp_path / "out", text, "table1")
    assert len(done.failed) == 2
    assert set(done.failed.values()) == {"RuntimeError: out of memory"}
    lines = [line for line in done.markdown.splitlines() if "offline rotation" in line]
    assert len(lines) == 2 and all(line.endswith("| failed |") for line in lines)
    traces = list((tmp_path / "out" / "rows").glob("*.error.txt"))
    assert len(traces) == 2 and "out of memory" in traces[0].read_text()
    quantizer.fails = {}
    assert not run(llama, tmp_path / "out", text, "table1").failed
    assert not list((tmp_path / "out" / "rows").glob("*.error.txt"))


def test_without_full_precision_nothing_runs(
    quantizer: Quantizer, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no engine")

    monkeypatch.setattr(measure, "load_model", broken)
    with pytest.raises(RuntimeError, match="no engine"):
        run(llama, tmp_path / "out", text, "table1")
    assert not quantizer.exported


def test_full_precision_is_measured_by_every_engine_that_measures_a_row(
    quantizer: Quantizer, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[str] = []

    def fake(bench: measure.Bench, folder: Path) -> Any:
        served.append(folder.name)
        return bench.model(Model())[0]

    monkeypatch.setattr(measure.Bench, "_served", fake)
    monkeypatch.setattr(measure, "require_vllm", lambda: None)
    monkeypatch.setattr(study, "versions_of", lambda *names: dict.fromkeys(names, ""))
    run(llama, tmp_path / "out", text, "table1", engine="vllm")
    assert len(served) == 7
    full = json.loads((tmp_path / "out" / "rows" / "full.json").read_text())
    assert set(full["measured"]) == {"vllm", "transformers"}  # SmoothQuant has no checkpoint
    smooth = next((tmp_path / "out" / "rows").glob("static-smooth*.json"))
    assert set(json.loads(smooth.read_text())["measured"]) == {"transformers"}


def test_several_texts_are_columns(
    quantizer: Quantizer, llama: Path, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    done = run(llama, tmp_path / "out", text, "table7", texts=[text, other])
    assert "| text: loss | excess | perplexity | other: loss |" in done.markdown

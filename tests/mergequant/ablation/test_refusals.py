"""The command's refusals: told before the first row, and nothing of another study mixed in."""

import sys
from pathlib import Path
from typing import Any

import pytest

from mergequant import InputError
from mergequant.ablation import ablate
from tests.mergequant.ablation.conftest import BASE, SETTINGS, Quantizer, run

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"paper": ["table2"]}, "--paper 'table2' is unknown: choose of table1, table4"),
    ({"texts": []}, "No evaluation text"),
    ({"texts": ["gone.txt"]}, "'gone.txt' does not exist"),
    ({"engine": "onnx"}, "--engine 'onnx' is unknown"),
    ({"dtype": "int8"}, "--dtype 'int8' is unknown"),
    ({"base": BASE.model_copy(update={"device": "abacus"})}, "Device 'abacus' cannot be used"),
    ({"window": 1}, "A window needs 2 tokens"),
    ({"tasks": ["piqa"], "task_folder": "/gone"}, "--task-folder /gone is not a folder"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[message for _, message in WRONG])
def test_faults_are_told_before_the_first_row(
    quantizer: Quantizer,
    llama: Path,
    text: Path,
    tmp_path: Path,
    changed: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        run(llama, tmp_path / "out", text, **changed)
    assert not quantizer.exported and not quantizer.in_memory
    assert not (tmp_path / "out").exists()


def test_a_missing_engine_is_told_before_the_first_row(
    quantizer: Quantizer, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="Engine vllm is not installed: pip install"):
        run(llama, tmp_path / "out", text, engine="vllm")
    assert not (tmp_path / "out").exists()


def test_a_text_given_twice_is_refused(
    quantizer: Quantizer, llama: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="given twice"):
        run(llama, tmp_path / "out", text, texts=[text, text])


def test_no_calibration_is_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No calibration text"):
        ablate(llama, tmp_path / "out", [], [text], base=BASE, **SETTINGS)


def test_a_folder_with_other_files_is_left_alone(
    quantizer: Quantizer, llama: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "letter.txt").touch()
    with pytest.raises(InputError, match="holds other files"):
        run(llama, tmp_path, text)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_run_that_was_killed_before_it_held_its_folder_can_be_begun_again(
    quantizer: Quantizer, llama: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "rows").mkdir(parents=True)
    run(llama, tmp_path / "out", text, "table7")
    assert list((tmp_path / "out" / "rows").glob("*.json"))


def test_rows_of_another_model_or_text_are_not_mixed_in(
    quantizer: Quantizer, llama: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(llama, out, text, "table7")
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    with pytest.raises(InputError, match=r"another calibration text \(.*other\.txt\)"):
        ablate(llama, out, [other], [text], paper=["table7"], base=BASE, **SETTINGS)
    with pytest.raises(InputError, match=r"another evaluation text or windows \(text\)"):
        run(llama, out, text, "table7", window=16)
    with pytest.raises(InputError, match=r"another setting \(dtype\)"):
        run(llama, out, text, "table7", dtype="bfloat16")
    assert len(quantizer.in_memory) == 3

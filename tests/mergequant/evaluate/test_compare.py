"""Both models measured alike: recovery, the table in the model card, the threshold."""

import json
import math
import shutil
from pathlib import Path

import pytest

from mergequant import InputError, cli
from mergequant.errors import DiskError
from mergequant.evaluate import compare as module
from mergequant.evaluate.compare import Figure, compare, record, refuse_below, refuse_no_fraction
from mergequant.evaluate.perplexity import perplexity
from mergequant.output.model_card import BEGIN

FAST = {"engine": "transformers", "window": 64, "most_windows": 3, "progress": False}
PPL = Figure("text", 20.0, 25.0, loss_added=math.log(1.25))
ACCURACY = Figure("task", 60.0, 57.0, errors=(2.0, 2.5))


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def test_recovery_is_what_is_left() -> None:
    assert PPL.recovery == pytest.approx(80.0)  # 20 / 25
    assert ACCURACY.recovery == pytest.approx(95.0)
    assert ACCURACY.as_row()["base"] == "60.00 ± 2.00"
    assert math.isnan(Figure("task", 0.0, 1.0, errors=(0.0, 1.0)).recovery)


def test_both_are_measured_as_perplexity_measures_them(llama: Path, copy: Path, text: Path) -> None:
    (figure,) = compare(llama, copy, [text], **FAST)  # type: ignore[arg-type]
    alone = [
        perplexity(x, text, engine="transformers", window=64, most_windows=3, progress=False)
        for x in (llama, copy)
    ]
    assert [figure.base, figure.quantized] == [x.perplexity for x in alone]
    assert figure.loss_added == alone[1].loss - alone[0].loss
    assert figure.what == "text, 3 x 64 tokens: perplexity"
    (stored,) = json.loads((copy / "evaluation.json").read_text())
    assert stored["recovery"] == figure.recovery
    card = (copy / "README.md").read_text()
    assert f"| {figure.what} | {figure.base:.2f} | {figure.quantized:.2f} |" in card
    assert "Not measured yet" not in card


def test_measured_again_the_table_is_replaced(copy: Path) -> None:
    record(copy, [PPL])
    once = (copy / "README.md").read_text()
    record(copy, [ACCURACY])
    twice = (copy / "README.md").read_text()
    assert "| text | 20.00 | 25.00 | 80.0 |" in once and "| text |" not in twice
    assert "| task | 60.00 ± 2.00 | 57.00 ± 2.50 | 95.0 |" in twice
    assert twice.count(BEGIN) == 1 and "## Limits" in twice


def test_a_checkpoint_without_a_card_gets_one(copy: Path) -> None:
    (copy / "README.md").unlink()
    record(copy, [PPL])
    assert (copy / "README.md").read_text().startswith("# copy\n\n## Evaluation\n")


def test_too_little_left_fails_by_name() -> None:
    refuse_below([PPL, ACCURACY], 0.8)
    with pytest.raises(InputError, match=r"^text: 80\.0% is left, less than the 95% of"):
        refuse_below([PPL, ACCURACY], 0.95)
    broken = Figure("broken", 20.0, math.nan)
    for order in ([broken, ACCURACY], [ACCURACY, broken, PPL]):
        with pytest.raises(InputError, match=r"^broken: nan% is left"):
            refuse_below(order, 0.5)
    for wrong in (0.0, 95.0, -1.0):
        with pytest.raises(InputError, match="no fraction"):
            refuse_no_fraction(wrong)


def test_what_is_not_there_is_found_before_anything_is_measured(
    llama: Path, copy: Path, text: Path
) -> None:
    with pytest.raises(InputError, match="Nothing to evaluate on"):
        compare(llama, copy, [])
    with pytest.raises(InputError, match="not a mergequant checkpoint"):
        compare(copy, llama, [text], **FAST)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not exist"):
        compare(llama, copy, [text, "none.txt"], **FAST)  # type: ignore[arg-type]
    assert not (copy / "evaluation.json").exists()


def test_texts_of_one_name_are_both_measured(
    llama: Path, copy: Path, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other" / text.name
    other.parent.mkdir()
    other.write_text("0123456789 " * 100)
    figures = compare(llama, copy, [text, other], **FAST)  # type: ignore[arg-type]
    assert [x.what.split(",")[0] for x in figures] == [str(text), str(other)]
    assert figures[0].base != figures[1].base


def test_figures_are_returned_though_the_card_cannot_be_written(
    llama: Path,
    copy: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object) -> None:
        raise DiskError("the disk is full")

    monkeypatch.setattr(module, "record", full)
    assert len(compare(llama, copy, [text], **FAST)) == 1  # type: ignore[arg-type]
    assert "not in the model card: the disk is full" in caplog.text


def test_the_command_prints_and_fails_as_asked(
    llama: Path, copy: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(llama), str(copy), "--text", str(text), "--engine", "transformers"]
    words += ["--window", "64", "--windows", "2"]
    cli.app([*words, "--json", "--at-least", "0.01"], standalone_mode=False)
    (figure,) = json.loads(capsys.readouterr().out)
    assert set(figure) == {"what", "base", "quantized", "errors", "loss_added", "recovery"}
    with pytest.raises(InputError, match="no fraction"):
        cli.app([*words, "--at-least", "7"], standalone_mode=False)
    record(copy, [Figure("text", 1.0, 2.0, loss_added=1.0)])
    assert "| text | 1.00 | 2.00 | 50.0 |" in (copy / "README.md").read_text()

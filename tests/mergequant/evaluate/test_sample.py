"""What a run says at its end: a few words of the checkpoint, and only if there is memory."""

import shutil
from pathlib import Path

import pytest

from mergequant import cli
from mergequant.calibration.tokenizer import load_tokenizer
from mergequant.evaluate.sample import BEGINNING, QUESTION, sample, sample_bytes
from tests.conftest import FEW

CHAT = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"


def test_words_are_continued_or_a_question_is_answered(checkpoint: Path, tmp_path: Path) -> None:
    asked, said = sample(checkpoint)
    assert asked == BEGINNING and said
    folder = Path(shutil.copytree(checkpoint, tmp_path / "chat"))
    tokenizer = load_tokenizer(folder)
    for template, expected in ((CHAT, QUESTION), ("{{ raise_exception('no') }}", BEGINNING)):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        assert sample(folder)[0] == expected


def test_it_takes_memory_for_every_weight(checkpoint: Path) -> None:
    hidden, queries, keys, wide, vocabulary, blocks = 64, 64, 32, 172, 258, 2
    block = hidden * (2 * queries + 2 * keys + 3 * wide)
    weights = blocks * block + 2 * vocabulary * hidden + hidden  # the last norm among them
    assert sample_bytes(checkpoint) == 8 * weights


@pytest.mark.parametrize("free", [None, 1, 2**40])
def test_the_command_ends_with_it_if_there_is_memory(
    llama: Path,
    text: Path,
    tmp_path: Path,
    free: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "few.yaml"
    recipe.write_text("".join(f"{x}: {getattr(FEW, x)}\n" for x in sorted(FEW.model_fields_set)))
    words = ["quantize", str(llama), str(tmp_path / "out"), "--calibration", str(text), "--quiet"]
    monkeypatch.setattr("mergequant.quantizer.run.refuse_if_short", lambda *_: None)
    monkeypatch.setattr("mergequant.quantizer.memory.available.free_host_bytes", lambda: free)
    cli.app([*words, "--recipe", str(recipe)], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    asked = free == 2**40  # where it is not known what is free, nothing is loaded
    assert (BEGINNING in lines[-1]) == asked
    assert lines[1].startswith("Serve it: vllm serve")


def test_a_checkpoint_that_is_there_is_no_failure(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("mergequant.evaluate.sample.sample", fail)
    cli._echo_sample(checkpoint, False)
    assert "not asked anything (RuntimeError: out of memory)" in capsys.readouterr().err


def test_it_can_be_left_out(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", str(llama), str(tmp_path / "out"), "--calibration", str(text), "--quiet"]
    words += ["--fast", "--rotation", "none", "--reconstruction", "none", "--no-sample"]
    cli.app([*words, "--sequence-length", "32", "--gptq-samples", "2"], standalone_mode=False)
    assert BEGINNING not in capsys.readouterr().out

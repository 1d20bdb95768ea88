"""Text to windows: what is read, how windows begin, and what is said when text is short."""

import json
import logging
import sys
import types
from pathlib import Path

import pytest
import torch

from mergequant.calibration.text import (
    Source,
    calibration_windows,
    evaluation_windows,
    leading_tokens,
    load_tokenizer,
    read_source,
    sha256_of,
    window_length,
)
from mergequant.errors import InputError

LONG = Source("long", ("abcdefghij" * 100,), "")


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_c4_documents_are_joined_by_a_space(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "c4.jsonl", [{"text": "one"}, {"text": "two", "url": "x"}])
    assert read_source(str(file)).text() == "one two"


def test_wikitext_lines_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    file = tmp_path / "wiki.txt"
    file.write_text(" \n = Title = \n \n Words . \n")
    # The published rows are empty where the file's line is blank.
    assert read_source(str(file)).text() == "\n\n = Title = \n\n\n\n\n Words . \n"


def test_other_text_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "novel.txt"
    file.write_text("One.\nTwo = 2.\n")
    assert read_source(str(file)).text() == "One.\nTwo = 2.\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "is empty"),
        ("blank.jsonl", "\n", "is empty"),
        ("bad.jsonl", '{"text": "a"}\nnot json\n', "Line 2 of .*bad.jsonl is not a JSON object"),
        ("other.jsonl", '{"body": "a"}\n', "Line 1 of .* 'text' field"),
        ("null.jsonl", '{"text": null}\n', "Line 1 of .* 'text' field"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_source(str(tmp_path / name))


def test_lines_end_where_json_lines_end(tmp_path: Path) -> None:
    file = tmp_path / "web.jsonl"
    file.write_text('{"text": "a\u2028b\x85c"}\n', encoding="utf-8")
    assert read_source(str(file)).text() == "a\u2028b\x85c"


def test_text_in_another_encoding_and_folders_are_refused(tmp_path: Path) -> None:
    for name in ("latin.txt", "latin.jsonl"):
        (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}\n')
        with pytest.raises(InputError, match="is not UTF-8 text"):
            read_source(str(tmp_path / name))
    with pytest.raises(InputError, match="is a folder: give a text file"):
        read_source(str(tmp_path))


def test_a_source_too_short_to_be_mixed_in_is_said(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = Source("short", ("x" * 20,), "")
    calibration_windows([short, LONG], load_tokenizer(llama), samples=2, length=64, seed=0)
    assert "short is shorter than one window and is left out" in caplog.text


def test_data_sets_are_read_by_name_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def load_dataset(path: str, name: str | None, split: str) -> dict[str, list[str]]:
        calls.append((path, name, split))
        return {"text": ["a", "b"]}

    stub = types.ModuleType("datasets")
    stub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    assert read_source("wikitext:wikitext-2-raw-v1", "test").text() == "a\n\nb"
    assert read_source("allenai/c4:en:validation").text() == "a b"
    assert calls == [
        ("wikitext", "wikitext-2-raw-v1", "test"),
        ("allenai/c4", "en", "validation"),
    ]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install .mergequant-vllm\[datasets\]"):
        read_source("wikitext")


def test_a_missing_file_is_not_taken_for_a_data_set() -> None:
    with pytest.raises(InputError, match=r"'no/such.txt' does not exist"):
        read_source("no/such.txt")


def test_windows_begin_as_the_tokenizer_begins(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    assert leading_tokens(tokenizer) == [0]
    windows = calibration_windows([LONG], tokenizer, samples=5, length=32, seed=0)
    assert windows.shape == (5, 32)
    assert windows[:, 0].eq(0).all() and windows[:, 1:].ne(0).all()


def test_sources_are_mixed_and_the_seed_decides(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    other = Source("other", ("0123456789" * 100,), "")

    def draw(seed: int) -> torch.Tensor:
        return calibration_windows([LONG, other], tokenizer, samples=8, length=32, seed=seed)

    texts = [tokenizer.decode(row[1:].tolist()) for row in draw(0)]
    assert [text[0].isdigit() for text in texts] == [False, True] * 4
    assert sha256_of(draw(0)) == sha256_of(draw(0)) != sha256_of(draw(1))


def test_windows_do_not_overlap(llama: Path) -> None:
    source = Source("count", (" ".join(f"{i:04}" for i in range(500)),), "")
    windows = calibration_windows([source], load_tokenizer(llama), samples=9, length=41, seed=3)
    assert len({tuple(row.tolist()) for row in windows}) == 9


def test_less_text_than_asked_is_said(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(llama)
    windows = calibration_windows([LONG], tokenizer, samples=99, length=101, seed=0)
    assert windows.shape == (10, 101)
    assert "10 calibration windows instead of 99" in caplog.text
    short = Source("short", ("x" * 40,), "")
    assert calibration_windows([short], tokenizer, samples=1, length=64, seed=0).shape == (1, 41)
    assert "Windows of 41 tokens instead of 64: the text is short" in caplog.text


def test_too_little_text_is_refused(llama: Path) -> None:
    with pytest.raises(InputError, match=r"has 5 tokens, fewer than 16"):
        calibration_windows(
            [Source("tiny", ("abcd",), "")], load_tokenizer(llama), samples=1, length=64, seed=0
        )


def test_a_context_shorter_than_the_window_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert window_length(2048, 256) == 256
    assert "256 tokens instead of 2048" in caplog.text
    assert window_length(2048, 4096) == 2048
    assert window_length(2048, None) == 2048


def test_evaluation_windows_are_consecutive_and_the_tail_is_dropped(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    windows = evaluation_windows(Source("s", ("abcdefghijkl",), ""), tokenizer, 5)
    assert windows.shape == (2, 5)
    assert windows.flatten().tolist() == tokenizer("abcdefghijkl")["input_ids"][:10]
    with pytest.raises(InputError, match="fewer than one window of 50"):
        evaluation_windows(Source("s", ("abc",), ""), tokenizer, 50)

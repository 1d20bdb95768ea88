"""What is read as text: files of each kind, saved and published data sets; and what is refused."""

import gzip
import json
import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mergequant.calibration import sources
from mergequant.calibration.sources import calibration_sources, read_source, row_of
from mergequant.errors import InputError

TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
TEXTS = [{"text": "one"}, {"text": None}, {"text": "two"}]


def lines(rows: list[Any]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def parquet(path: Path, rows: list[Any]) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), path)


def saved(path: Path, rows: list[Any]) -> None:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(path)


def saved_splits(path: Path, rows: list[Any]) -> None:
    from datasets import Dataset, DatasetDict

    other = Dataset.from_list([{"text": "of the test"}])
    DatasetDict({"train": Dataset.from_list(rows), "test": other}).save_to_disk(path)


WRITERS: dict[str, Callable[[Path, list[Any]], object]] = {
    "x.jsonl": lambda path, rows: path.write_text(lines(rows)),
    "x.JSONL": lambda path, rows: path.write_text(lines(rows)),
    "x.ndjson": lambda path, rows: path.write_text(lines(rows)),
    "mark.jsonl": lambda path, rows: path.write_text(lines(rows), encoding="utf-8-sig"),
    "x.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows).encode())),
    "c4.json": lambda path, rows: path.write_text(lines(rows)),
    "array.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "x.parquet": parquet,
    "saved": saved,
    "splits": saved_splits,
}


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_the_same_in_every_kind_of_file(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    WRITERS[name](tmp_path / name, TEXTS)
    source = read_source(str(tmp_path / name))
    assert source.rows == ("one", "two") and source.text() == "one two"
    assert "1 rows without text are skipped" in caplog.text


@pytest.mark.parametrize("name", WRITERS)
def test_conversations_are_the_same_in_every_kind_of_file(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, [{"messages": TURNS}, {"messages": TURNS[:1]}])
    source = read_source(str(tmp_path / name))
    assert source.rows == (tuple(TURNS), tuple(TURNS[:1]))
    assert source.text(lambda turns: f"<{turns[0]['content']}{len(turns)}>") == "<Who?2><Who?1>"


@pytest.mark.parametrize(("name", "mark"), [("x.csv", ","), ("x.TSV", "\t"), ("x.csv.gz", ",")])
def test_tables_are_read_by_their_heads(tmp_path: Path, name: str, mark: str) -> None:
    long = "x" * 200_000  # longer than csv reads by default
    text = f'id{mark}text\n1{mark}"one, ""two""\nthree"\n2{mark}{long}\n'
    data = text.encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read_source(str(tmp_path / name)).rows == ('one, "two"\nthree', long)


def test_plain_text_loses_its_byte_order_mark_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "novel.txt"
    file.write_text("One.\nTwo = 2.\n", encoding="utf-8-sig")
    assert read_source(str(file)).text() == "One.\nTwo = 2.\n"
    (tmp_path / "novel.md.gz").write_bytes(gzip.compress(b"# Three"))
    assert read_source(str(tmp_path / "novel.md.gz")).text() == "# Three"


def test_wikitext_lines_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    file = tmp_path / "wiki.txt"
    file.write_text(" \n = Title = \n \n Words . \n")
    # The published rows are empty where the file's line is blank.
    assert read_source(str(file)).text() == "\n\n = Title = \n\n\n\n\n Words . \n"


@pytest.mark.parametrize("name", ["x.parquet", "saved"])
def test_wikitext_is_wikitext_in_every_kind_of_file(tmp_path: Path, name: str) -> None:
    rows = ["", " = Title = \n", "", " Words . \n"]  # as the published data set has them
    WRITERS[name](tmp_path / name, [{"text": row} for row in rows])
    assert read_source(str(tmp_path / name)).text() == "\n\n".join(rows)


def test_halves_of_characters_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "web.jsonl").write_text('{"text": "a \\ud83d b \\ud83d\\ude00"}\n')
    (text,) = read_source(str(tmp_path / "web.jsonl")).rows
    assert text == "a \ufffd b \U0001f600"
    assert row_of("Row 1", {"messages": [{"role": "user", "content": "\ud83d"}]}) == (
        {"role": "user", "content": "\ufffd"},
    )


def test_lines_end_where_json_lines_end(tmp_path: Path) -> None:
    file = tmp_path / "web.jsonl"
    file.write_text('{"text": "a\u2028b\x85c"}\n', encoding="utf-8")
    assert read_source(str(file)).text() == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("value", "row"),
    [
        ("bare", "bare"),
        (None, None),
        ({"text": None}, None),
        ({"messages": []}, None),
        ({"messages": None, "id": 3}, None),
        ({"text": "a", "messages": TURNS}, "a"),
        (
            {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]},
            tuple(TURNS),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}]},
            tuple(TURNS[:1]),
        ),
    ],
)
def test_rows_have_text_or_a_conversation_or_nothing(value: Any, row: Any) -> None:
    assert row_of("Row 1", value) == row


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"body": "a", "id": 1}, r"Row 1 has no field 'text'.*\(fields body, id\): rename"),
        (7, "Row 1 has no field 'text'"),
        ({"text": 7}, "no text in its field 'text'"),
        ({"messages": "a"}, "no text in its field 'messages'"),
        ({"messages": [{"role": "user"}]}, "'role' and 'content'"),
        ({"conversations": [{"from": "nobody", "value": "a"}]}, "field 'conversations'"),
    ],
)
def test_rows_of_another_shape_are_refused(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        row_of("Row 1", value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.jsonl", b"\n", "is empty"),
        ("null.jsonl", b'{"text": null}\n', "is empty"),
        ("bad.jsonl", b'{"text": "a"}\nnot json\n', "Line 2 of .*bad.jsonl is not JSON"),
        ("other.csv", b"body\na\n", "Line 2 of .*other.csv has no field 'text'.*fields body"),
        ("latin.txt", b"caf\xe9", "is not UTF-8 text"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', "is not UTF-8 text"),
        ("wide.txt", "\ufeffa".encode("utf-16-le"), "is not UTF-8 text"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n')[:-9], "cannot be read"),
        ("torn.jsonl.gz", gzip.compress(b"abc" * 99)[:12] + bytes(40), "cannot be read"),
        ("x.parquet", b"PAR1", "is not a Parquet file"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_source(str(tmp_path / name))


def test_a_parquet_file_without_text_names_its_columns(tmp_path: Path) -> None:
    parquet(tmp_path / "x.parquet", [{"body": "a", "id": 1}])
    with pytest.raises(InputError, match=r"columns body, id"):
        read_source(str(tmp_path / "x.parquet"))


def test_folders_are_saved_data_sets_or_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder: give a text file"):
        read_source(str(tmp_path))
    saved_splits(tmp_path / "splits", TEXTS)
    assert read_source(str(tmp_path / "splits"), "test").text() == "of the test"
    with pytest.raises(InputError, match="no split 'validation' but train, test"):
        read_source(str(tmp_path / "splits"), "validation")
    (tmp_path / "splits" / "test" / "state.json").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_source(str(tmp_path / "splits"))


@pytest.mark.parametrize("name", ["no/such.txt", "no/such.JSONL", "such.csv", "c4.json.gz"])
def test_a_missing_file_is_not_taken_for_a_data_set(name: str) -> None:
    with pytest.raises(InputError, match=rf"'{name}' does not exist"):
        read_source(name)


def test_no_source_is_refused() -> None:
    with pytest.raises(InputError, match="No calibration text"):
        calibration_sources([])


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of a stand-in for `load_dataset`, whose rows never end."""
    calls: list[Any] = []

    def rows() -> Iterator[dict[str, str]]:
        while True:
            calls.append("row")
            yield {"text": "abcdefgh"}

    def load_dataset(path: str, name: str | None, split: str, streaming: bool) -> Any:
        calls.append((path, name, split, streaming))
        return rows()

    stub = types.ModuleType("datasets")
    stub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    monkeypatch.setattr(sources, "LONGEST_TEXT", 50)
    return calls


def test_data_sets_are_streamed_by_name_configuration_and_split(
    streamed: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mergequant"):
        assert read_source("wikitext:wikitext-2-raw-v1", "test").text()[:11] == "abcdefgh\n\na"
        assert read_source("allenai/c4:en:validation").text()[:10] == "abcdefgh a"
    assert [call for call in streamed if call != "row"] == [
        ("wikitext", "wikitext-2-raw-v1", "test", True),
        ("allenai/c4", "en", "validation", True),
    ]
    assert streamed.count("row") < 20 and "is the first that is not used" in caplog.text


def test_without_the_library_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved(tmp_path / "saved", TEXTS)
    parquet(tmp_path / "x.parquet", TEXTS)
    for module in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("wikitext", str(tmp_path / "saved"), str(tmp_path / "x.parquet")):
        with pytest.raises(InputError, match=r"pip install .mergequant-vllm\[datasets\]"):
            read_source(name)

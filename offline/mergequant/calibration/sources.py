"""Text to calibrate or evaluate on: files, saved and published data sets, as rows.

| what is named            | its rows                                        |
|--------------------------|-------------------------------------------------|
| `.jsonl`, `.ndjson`      | a JSON value in each line                       |
| `.json`                  | the elements of an array, or as `.jsonl`        |
| `.csv`, `.tsv`           | its lines, by the names in the first            |
| `.parquet`               | its rows                                        |
| any other file           | one, the whole; of WikiText: its lines          |
| a saved data set         | of the split that is wanted                     |
| `PATH[:NAME[:SPLIT]]`    | of a data set of the Hugging Face hub, streamed |

A row is a text, or has one in its field `text`, or a conversation in `messages` or `conversations`,
which the model's chat template writes out. Rows that are null are skipped and counted. Files may be
compressed with gzip (`.jsonl.gz`).
"""

import csv
import gzip
import io
import json
import logging
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergequant.errors import InputError

Conversation = tuple[Mapping[str, str], ...]  # each turn with `role` and `content`
Row = str | Conversation

LONGEST_TEXT = 16 * 2**20  # characters of one source that are used to calibrate
_WIKITEXT_HEADING = re.compile(r"^ = [^=].* = $", re.MULTILINE)
_FIELDS = ("text", "messages", "conversations")
# What ShareGPT's rows call those who speak.
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}

logger = logging.getLogger("mergequant")


@dataclass(frozen=True)
class Source:
    """One text source: `rows` in order, and the separator that published numbers join them with."""

    name: str
    rows: tuple[Row, ...]
    separator: str

    def text(self, chat: Callable[[Conversation], str] = json.dumps) -> str:
        """The rows as one text; `chat` writes a conversation out."""
        return self.separator.join(row if isinstance(row, str) else chat(row) for row in self.rows)


def calibration_sources(names: Sequence[str | Path]) -> list[Source]:
    """The sources to calibrate on; raises InputError if none is named."""
    if not names:
        raise InputError("No calibration text: give --calibration FILE (.txt or .jsonl).")
    return [read_source(str(name)) for name in names]


def read_source(name: str, default_split: str = "train") -> Source:
    """Read a file or a data set; what may be named is in this module's table.

    WikiText's lines are joined by a blank line, conversations by nothing, other rows by a space, as
    the published perplexities do.

    Raises:
        InputError: there is no such source, it has no text, or a row is none.
    """
    path = Path(name)
    if path.is_dir():
        source = _joined(name, _saved_rows(path, default_split))
    elif path.is_file():
        source = _read_file(path)
    elif _kind(path) in (*_READERS, ".txt"):
        raise InputError(f"Text file {name!r} does not exist: check the path.")
    else:
        source = _read_data_set(name, default_split)
    if not any(row if not isinstance(row, str) else row.strip() for row in source.rows):
        raise InputError(f"Text source {name!r} is empty: give a file with text in it.")
    return source


def _kind(path: Path) -> str:
    """The suffix that says how a file is read, in small letters, without that of gzip."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _read_file(path: Path) -> Source:
    reader = _READERS.get(_kind(path))
    if reader is not None:
        return _joined(str(path), reader(path))
    text = _text_of(path)
    if not _WIKITEXT_HEADING.search(text[:10_000]):
        return Source(str(path), (text,), "")
    logger.info("%s is WikiText: its lines are joined by a blank line", path)
    # The published data set has an empty row for each blank line.
    rows = (row if row.strip() else "" for row in io.StringIO(text))
    return Source(str(path), tuple(rows), "\n\n")


def _text_of(path: Path) -> str:
    """A file's text, without a byte order mark, its line ends as they are read everywhere."""
    try:
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig") as file:
            return str(file.read())
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}): convert it first.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}): check the file.") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): it also cuts at separators that JSON allows inside a string.
    for number, line in enumerate(io.StringIO(_text_of(path)), start=1):
        if line.strip():
            where = f"Line {number} of {path}"
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise InputError(f"{where} is not JSON: mend the file.") from error


def _json_array(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(_text_of(path))
    except ValueError:  # C4's `.json` files have a value in each line
        yield from _json_lines(path)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        yield f"Row {number} of {path}", row


def _separated(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is less than a book's chapter
    file = io.StringIO(_text_of(path), newline="")
    reader = csv.DictReader(file, delimiter="\t" if _kind(path) == ".tsv" else ",")
    try:
        for row in reader:
            yield f"Line {reader.line_num} of {path}", row
    except csv.Error as error:
        raise InputError(f"{path} is not a table ({error}): mend the file.") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(_needs_datasets(f"{path} is Parquet, and that")) from error
    number = 0
    try:
        with ParquetFile(path) as file:
            columns = [name for name in _FIELDS if name in file.schema_arrow.names]
            names = ", ".join(file.schema_arrow.names)
            for batch in file.iter_batches(columns=columns or None):
                for row in batch.to_pylist():
                    number += 1
                    yield f"Row {number} of {path} (columns {names})", row
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} is not a Parquet file ({error}): check the file.") from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".csv": _separated,
    ".tsv": _separated,
    ".parquet": _parquet,
}


def _saved_rows(folder: Path, split: str) -> Iterator[tuple[str, Any]]:
    """Rows of a folder that `save_to_disk` of the library `datasets` made."""
    names = ("dataset_dict.json", "state.json")
    if not any((folder / name).is_file() for name in names):
        raise InputError(f"{str(folder)!r} is a folder: give a text file in it.")
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        raise InputError(_needs_datasets(f"{folder} is a saved data set, and that")) from error
    try:
        saved: Any = load_from_disk(str(folder))
    except Exception as error:  # the library raises many types, all meaning: damaged
        raise InputError(f"{folder} is a data set that cannot be read ({error}).") from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise InputError(
                f"{folder} has no split {split!r} but {', '.join(saved)}: give the folder of one."
            )
        saved = saved[split]
    for number, row in enumerate(saved, start=1):
        yield f"Row {number} of {folder}", row


def _read_data_set(name: str, default_split: str) -> Source:
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(_needs_datasets(f"{name!r} is not a file, and a data set")) from error
    separator = "\n\n" if "wikitext" in path else None
    try:
        # Streamed: what is wanted are some MiB of it, and C4 has 300 GB.
        found: Any = load_dataset(
            path, config or None, split=split or default_split, streaming=True
        )
        named = ((f"Row {number} of {name}", row) for number, row in enumerate(found, start=1))
        return _joined(name, _first(named), separator)
    except InputError:
        raise
    except Exception as error:  # the library raises many types, all meaning: not to be had
        raise InputError(
            f"{name!r} is neither a file nor a data set that can be loaded "
            f"({type(error).__name__}): check the name and the network."
        ) from error


def _first(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The rows of a stream until there is as much text as is ever used."""
    characters = 0
    for where, row in rows:
        if characters > LONGEST_TEXT:
            logger.info("%s is the first that is not used", where)
            return
        yield where, row
        characters += len(str(row))


def _joined(name: str, found: Iterable[tuple[str, Any]], separator: str | None = None) -> Source:
    """A source of rows as they were found, each with where that was."""
    rows: list[Row] = []
    skipped = 0
    for where, value in found:
        row = row_of(where, value)
        if row is None:
            skipped += 1
        else:
            rows.append(row)
    if skipped:
        logger.warning("%s: %d rows without text are skipped", name, skipped)
    return Source(name, tuple(rows), separator or _separator(name, rows))


def _separator(name: str, rows: Sequence[Row]) -> str:
    """What published numbers join such rows with."""
    if any(not isinstance(row, str) for row in rows):
        return ""
    if any(isinstance(x, str) and _WIKITEXT_HEADING.search(x.rstrip("\n")) for x in rows[:100]):
        logger.info("%s is WikiText: its lines are joined by a blank line", name)
        return "\n\n"
    return " "


def row_of(where: str, value: Any) -> Row | None:
    """The text or conversation of one row; None if it has none.

    Args:
        where: names the row in errors.
        value: a string; or a mapping with a field `text`, `messages` or `conversations`.
    """
    if value is None or isinstance(value, str):
        return _whole(value)
    if isinstance(value, Mapping):
        for field in _FIELDS:
            if field in value:
                return _field(where, field, value[field])
    fields = f"fields {', '.join(map(str, value))}" if isinstance(value, Mapping) else "none"
    raise InputError(
        f"{where} has no field 'text', 'messages' or 'conversations' ({fields}): rename the field "
        "with the text."
    )


def _field(where: str, field: str, value: Any) -> Row | None:
    if value is None or (field == "text" and isinstance(value, str)):
        return _whole(value)
    if field != "text" and isinstance(value, Sequence) and not isinstance(value, str):
        turns = [_turn(turn) for turn in value]
        known = tuple(turn for turn in turns if turn is not None)
        if len(known) == len(turns):
            return known or None
    raise InputError(
        f"{where} has no text in its field {field!r}: it must be a string in 'text', or turns with "
        "'role' and 'content' in 'messages'."
    )


def _turn(turn: Any) -> dict[str, str] | None:
    """One turn of a conversation; None if it is none."""
    if not isinstance(turn, Mapping):
        return None
    speaker = turn.get("role") or _ROLES.get(turn.get("from", ""))
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):  # OpenAI's parts, of which those of text are taken
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "".join(part for part in parts if part)
    if not isinstance(speaker, str) or not isinstance(content, str):
        return None
    return {"role": speaker, "content": _whole(content) or ""}


def _whole(text: str | None) -> str | None:
    """A text without halves of characters, which JSON allows and tokenizers refuse."""
    if text is None:
        return None
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _needs_datasets(what: str) -> str:
    return (
        f"{what} needs the package 'datasets': "
        'pip install "mergequant-vllm[datasets]", or give a text file.'
    )

"""Calibration and evaluation text: files or data sets to token windows."""

import hashlib
import io
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mergequant.errors import InputError

SHORTEST_WINDOW = 16
_WIKITEXT_HEADING = re.compile(r"^ = [^=].* = $", re.MULTILINE)
_LONGEST_TEXT = 16 * 2**20  # characters of one source that are tokenized

logger = logging.getLogger("mergequant")


@dataclass(frozen=True)
class Source:
    """One text source: `rows` in order, and the separator that published numbers join them with."""

    name: str
    rows: tuple[str, ...]
    separator: str

    def text(self) -> str:
        """The rows as one text."""
        return self.separator.join(self.rows)


def read_source(name: str, default_split: str = "train") -> Source:
    """A `.txt` file, a `.jsonl` file with `text` in each line, or a data set `PATH[:NAME[:SPLIT]]`.

    WikiText's lines are joined by a blank line and C4's documents by a space, as the published
    perplexities do.
    """
    path = Path(name)
    if path.is_dir():
        raise InputError(f"{name!r} is a folder: give a text file in it.")
    if path.is_file():
        source = _read_file(path)
    elif path.suffix in (".txt", ".jsonl", ".json"):
        raise InputError(f"Text file {name!r} does not exist: check the path.")
    else:
        source = _read_data_set(name, default_split)
    if not source.text().strip():
        raise InputError(f"Text source {name!r} is empty: give a file with text in it.")
    return source


def calibration_sources(names: Sequence[str | Path]) -> list[Source]:
    """The sources to calibrate on; raises InputError if none is named."""
    if not names:
        raise InputError("No calibration text: give --calibration FILE (.txt or .jsonl).")
    return [read_source(str(name)) for name in names]


def _read_file(path: Path) -> Source:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}): convert it first.") from error
    return _read_jsonl(path, text) if path.suffix in (".jsonl", ".json") else _read_txt(path, text)


def _read_txt(path: Path, text: str) -> Source:
    if not _WIKITEXT_HEADING.search(text[:10_000]):
        return Source(str(path), (text,), "")
    logger.info("%s is WikiText: its lines are joined by a blank line", path)
    # The published data set has an empty row for each blank line.
    rows = (row if row.strip() else "" for row in io.StringIO(text))
    return Source(str(path), tuple(rows), "\n\n")


def _read_jsonl(path: Path, text: str) -> Source:
    rows = []
    # Not splitlines(): it also cuts at separators that JSON allows inside a string.
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            row = None
        if not isinstance(row, str):
            raise InputError(
                f"Line {number} of {path} is not a JSON object with a 'text' field: mend the file."
            )
        rows.append(row)
    return Source(str(path), tuple(rows), " ")


def _read_data_set(name: str, default_split: str) -> Source:
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"{name!r} is not a file, and data sets need the package 'datasets': "
            'pip install "mergequant-vllm[datasets]", or give a file.'
        ) from error
    try:
        rows: Any = load_dataset(path, config or None, split=split or default_split)["text"]
    except Exception as error:  # the library raises many types, all meaning: not to be had
        raise InputError(
            f"{name!r} is neither a file nor a data set with a 'text' column that can be loaded "
            f"({type(error).__name__}): check the name and the network."
        ) from error
    return Source(name, tuple(rows), "\n\n" if "wikitext" in path else " ")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer; never runs code that the folder brings."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False
        )
    except Exception as error:  # transformers raises many types for a missing or broken tokenizer
        raise InputError(
            f"{folder} has no tokenizer that transformers can load ({type(error).__name__}): "
            "copy the model's tokenizer files into it."
        ) from error
    return tokenizer


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text (BOS, for Llama; nothing, for Qwen2)."""
    probe = "a"
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


def token_stream(source: Source, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """int64 [tokens] of a source, without special tokens."""
    text = source.text()
    if len(text) > _LONGEST_TEXT:
        logger.warning("%s: only the first %d MiB are used", source.name, _LONGEST_TEXT // 2**20)
        text = text[:_LONGEST_TEXT]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def window_length(wanted: int, context: int | None) -> int:
    """`wanted` tokens, or the model's context if that is shorter (said in the log)."""
    if context is not None and context < wanted:
        logger.warning("Windows of %d tokens instead of %d: the model's context", context, wanted)
        return context
    return wanted


def calibration_windows(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    seed: int,
) -> Tensor:
    """Random windows that do not overlap, the sources in turn, each begun as the tokenizer begins.

    Args:
        samples: windows wanted; fewer are returned, and a warning logged, if the text is short.
        length: tokens in a window, the leading special tokens among them.

    Returns:
        int64 [windows, length].
    """
    start = torch.tensor(leading_tokens(tokenizer), dtype=torch.int64)
    streams = [token_stream(source, tokenizer) for source in sources]
    longest = max(len(stream) for stream in streams) + len(start)
    if longest < SHORTEST_WINDOW:
        raise InputError(
            f"The calibration text has {longest} tokens, fewer than {SHORTEST_WINDOW}: give more."
        )
    if longest < length:
        logger.warning("Windows of %d tokens instead of %d: the text is short", longest, length)
        length = longest
    body = length - len(start)
    generator = torch.Generator().manual_seed(seed)
    shuffled = [_shuffled_windows(stream, body, generator) for stream in streams]
    for source, windows_of_source in zip(sources, shuffled, strict=True):
        if not windows_of_source:
            logger.warning("%s is shorter than one window and is left out", source.name)
    windows = _in_turn(shuffled)[:samples]
    if len(windows) < samples:
        logger.warning(
            "%d calibration windows instead of %d: the text has no more", len(windows), samples
        )
    return torch.stack([torch.cat((start, window)) for window in windows])


def _shuffled_windows(stream: Tensor, length: int, generator: torch.Generator) -> list[Tensor]:
    count = len(stream) // length
    order = torch.randperm(count, generator=generator).tolist()
    return [stream[i * length : (i + 1) * length] for i in order]


def _in_turn(lists: Sequence[list[Tensor]]) -> list[Tensor]:
    longest = max(len(windows) for windows in lists)
    return [windows[i] for i in range(longest) for windows in lists if i < len(windows)]


def evaluation_windows(source: Source, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Consecutive windows as published perplexities cut them: no overlap, tail dropped.

    The text is tokenized once, with the special tokens that the tokenizer adds at its start.

    Returns:
        int64 [windows, length].
    """
    ids = torch.tensor(tokenizer(source.text(), verbose=False)["input_ids"], dtype=torch.int64)
    count = len(ids) // length
    if count == 0:
        raise InputError(
            f"{source.name} has {len(ids)} tokens, fewer than one window of {length}: give more "
            "text or a shorter --window."
        )
    return ids[: count * length].reshape(count, length)


def sha256_of(windows: Tensor) -> str:
    """Fingerprint of token windows: shape and ids."""
    digest = hashlib.sha256(str(tuple(windows.shape)).encode())
    digest.update(windows.contiguous().numpy().tobytes())
    return digest.hexdigest()

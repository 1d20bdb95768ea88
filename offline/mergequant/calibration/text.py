"""Calibration and evaluation text to token windows."""

import hashlib
import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mergequant.calibration.sources import LONGEST_TEXT, Source
from mergequant.calibration.tokenizer import leading_tokens, written
from mergequant.errors import InputError

SHORTEST_WINDOW = 16

logger = logging.getLogger("mergequant")


def token_stream(source: Source, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """int64 [tokens] of a source, without special tokens."""
    text = written(source, tokenizer)
    if len(text) > LONGEST_TEXT:
        logger.warning("%s: only the first %d MiB are used", source.name, LONGEST_TEXT // 2**20)
        text = text[:LONGEST_TEXT]
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
    text = written(source, tokenizer)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
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

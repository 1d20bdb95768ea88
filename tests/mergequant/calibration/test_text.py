"""Text to windows: what is read, how windows begin, and what is said when text is short."""

import logging
from pathlib import Path

import pytest
import torch

from mergequant.calibration.sources import Source
from mergequant.calibration.text import (
    calibration_windows,
    evaluation_windows,
    sha256_of,
    window_length,
)
from mergequant.calibration.tokenizer import leading_tokens, load_tokenizer
from mergequant.errors import InputError

LONG = Source("long", ("abcdefghij" * 100,), "")


def test_a_source_too_short_to_be_mixed_in_is_said(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = Source("short", ("x" * 20,), "")
    calibration_windows([short, LONG], load_tokenizer(llama), samples=2, length=64, seed=0)
    assert "short is shorter than one window and is left out" in caplog.text


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

"""A checkpoint beside the model it was made of, through the same engine: what is left of it."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mergequant.calibration.text import window_length
from mergequant.calibration.tokenizer import load_tokenizer, refuse_unknown_tokens
from mergequant.errors import DiskError, InputError
from mergequant.evaluate.perplexity import (
    Engine,
    perplexity_of,
    prompt_logprobs,
    reference_logprobs,
    refuse_no_window,
    refuse_unknown,
    text_windows,
    vllm_engine,
)
from mergequant.evaluate.reference_forward import default_device, load_model
from mergequant.evaluate.tasks import Tasks
from mergequant.model.reader import Reader, locate, open_checkpoint
from mergequant.model.shapes import widths
from mergequant.output.companions import README
from mergequant.output.durable_files import write_durably, write_json
from mergequant.output.model_card import evaluation_table, with_evaluation

RESULTS = "evaluation.json"

logger = logging.getLogger("mergequant")


@dataclass(frozen=True)
class Figure:
    """One figure of both models.

    Attributes:
        what: the text or task, and what was measured on it.
        base, quantized: perplexities, or accuracies in percent.
        errors: standard errors of accuracies, or None.
        loss_added: nats a token, or None for an accuracy.
    """

    what: str
    base: float
    quantized: float
    errors: tuple[float, float] | None = None
    loss_added: float | None = None

    @property
    def recovery(self) -> float:
        """What is left, in percent: of accuracy; of perplexity, its inverse."""
        better, whole = (self.quantized, self.base) if self.errors else (self.base, self.quantized)
        return 100.0 * better / whole if whole else math.nan

    def as_row(self) -> dict[str, Any]:
        """The figure as the model card shows it."""
        values = [f"{self.base:.2f}", f"{self.quantized:.2f}"]
        if self.errors:
            values = [f"{x} ± {error:.2f}" for x, error in zip(values, self.errors, strict=True)]
        return {
            "what": self.what,
            "base": values[0],
            "quantized": values[1],
            "recovery": self.recovery,
        }

    def as_json(self) -> dict[str, Any]:
        """The fields and the recovery."""
        return {**self.__dict__, "recovery": self.recovery}


def compare(
    base: str | Path,
    checkpoint: str | Path,
    texts: Sequence[str | Path],
    *,
    tasks: Sequence[str] = (),
    task_folder: str | Path | None = None,
    engine: Engine = "vllm",
    window: int = 2048,
    most_windows: int | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    progress: bool = True,
) -> list[Figure]:
    """Measure both models; a checkpoint in a local folder gets the figures in its model card.

    Args:
        base: folder or hub id of the 16-bit model.
        checkpoint: of the mergequant checkpoint made of it.
        texts: files or data sets for perplexity, see `mergequant.calibration.sources`.
        tasks: of lm-eval, zero-shot, always in the reference arithmetic.
        task_folder: of tasks' YAML files.
        engine: `vllm` or `transformers`, for perplexity.
        trust_remote_code: run code of the models' own that their tokenizers name.

    Raises:
        InputError: before anything is measured, if something asked for is not there.
    """
    refuse_unknown(engine, dtype)
    refuse_no_window(window, most_windows)
    if not texts and not tasks:
        raise InputError("Nothing to evaluate on: give --text FILE or --tasks NAME.")
    folders = [locate(base), open_checkpoint(checkpoint).folder]
    known = Tasks(tasks, task_folder) if tasks else None
    tokenizer = load_tokenizer(folders[0], trust_remote_code=trust_remote_code)
    windows = _windows(folders, tokenizer, texts, window, most_windows)
    start = partial(_losses, [ids for _, ids in windows], engine, dtype, trust_remote_code)
    losses = [start(folder, progress) for folder in folders]
    figures = [
        Figure(f"{name}: perplexity", perplexity_of(a), perplexity_of(b), loss_added=b - a)
        for (name, _), a, b in zip(windows, *losses, strict=True)
    ]
    if known is not None:
        figures += _accuracies(folders, tokenizer, known, dtype, progress)
    if Path(checkpoint).is_dir():
        try:
            record(Path(checkpoint), figures)
        except DiskError as error:  # what was measured is not lost
            logger.warning("The figures are not in the model card: %s", error)
    return figures


def _windows(
    folders: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | Path],
    window: int,
    most: int | None,
) -> list[tuple[str, Tensor]]:
    """Name and token windows of each text, of a length that both models take."""
    length = window
    for folder in folders:
        length = window_length(length, Reader(folder).config.get("max_position_embeddings"))
    windows = []
    stems = [Path(text).stem for text in texts]
    for text, stem in zip(texts, stems, strict=True):
        ids = text_windows(text, tokenizer, length, most)
        for folder in folders:
            refuse_unknown_tokens(ids, tokenizer, widths(Reader(folder).config)["vocabulary"])
        name = stem if stems.count(stem) == 1 else str(text)
        windows.append((f"{name}, {len(ids)} x {length} tokens", ids))
    return windows


def _losses(
    windows: Sequence[Tensor],
    engine: Engine,
    dtype: str,
    trust_remote_code: bool,
    folder: Path,
    progress: bool,
) -> list[float]:
    """Mean loss of each text's windows, nats a token; one engine for all of them."""
    if not windows:
        return []
    if engine == "vllm":
        length = windows[0].shape[1] + 1
        with vllm_engine(
            folder,
            dtype=dtype,
            enforce_eager=True,
            trust_remote_code=trust_remote_code,
            max_model_len=length,
        ) as llm:
            return [-float(prompt_logprobs(llm, ids, progress).mean()) for ids in windows]
    model = load_model(folder, getattr(torch, dtype)).to(default_device())
    return [
        -float(reference_logprobs(model, ids.to(default_device()), progress).mean())
        for ids in windows
    ]


def _accuracies(
    folders: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    dtype: str,
    progress: bool,
) -> list[Figure]:
    base, quantized = (
        tasks.measure(
            load_model(x, getattr(torch, dtype)).to(default_device()), tokenizer, progress
        )
        for x in folders
    )
    return [
        Figure(
            f"{name}: accuracy, %",
            base[name].percent,
            quantized[name].percent,
            (base[name].error, quantized[name].error),
        )
        for name in base
    ]


def record(checkpoint: Path, figures: Sequence[Figure]) -> None:
    """Write the figures into a checkpoint's folder: `evaluation.json`, and its model card."""
    write_json(checkpoint / RESULTS, [figure.as_json() for figure in figures])
    card = checkpoint / README
    before = card.read_text(encoding="utf-8") if card.is_file() else f"# {checkpoint.name}\n"
    table = evaluation_table([figure.as_row() for figure in figures])
    after = with_evaluation(before, table)
    write_durably(card, lambda path: path.write_text(after, encoding="utf-8"))


def refuse_no_fraction(least: float | None) -> None:
    """Raise InputError unless `least`, if there is one, is a part of a whole."""
    if least is not None and not 0 < least <= 1:
        raise InputError(f"--at-least {least} is no fraction: give one above 0 and up to 1.")


def refuse_below(figures: Sequence[Figure], least: float) -> None:
    """Raise InputError, naming the worst, if less than the fraction `least` of a figure is left."""
    # A figure that is no number is no recovery.
    short = [figure for figure in figures if not figure.recovery >= 100 * least]
    if short:
        worst = min(short, key=lambda x: -math.inf if math.isnan(x.recovery) else x.recovery)
        raise InputError(
            f"{worst.what}: {worst.recovery:.1f}% is left, less than the {100 * least:g}% of "
            "--at-least: quantize at a higher price (--best, or --static-bits 8 --dynamic-bits 8)."
        )

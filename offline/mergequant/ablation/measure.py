"""A model's losses on the texts and its accuracies on the tasks."""

import gc
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mergequant.calibration.text import window_length
from mergequant.calibration.tokenizer import load_tokenizer
from mergequant.errors import InputError
from mergequant.evaluate.perplexity import (
    ENGINES,
    perplexity_of,
    prompt_logprobs,
    reference_logprobs,
    refuse_no_window,
    refuse_unknown,
    require_vllm,
    text_windows,
    vllm_engine,
)
from mergequant.evaluate.reference_forward import load_model
from mergequant.evaluate.tasks import Tasks
from mergequant.quantizer.prepare import find_device

VLLM, REFERENCE = ENGINES


class Measured(BaseModel):
    """Loss on one text: mean negative log-probability of a token, nats."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return perplexity_of(self.loss)


@dataclass(frozen=True)
class Bench:
    """What every row is measured on.

    Attributes:
        windows: token ids int64 [windows, length] of each text, by its name.
        engine: measures the rows that have a checkpoint; the others have the reference.
        dtype: of everything that is not quantized.
        tasks: measured on the reference, whatever the engine.
    """

    windows: dict[str, Tensor]
    engine: str
    dtype: str
    tasks: Tasks | None
    tokenizer: Any
    progress: bool

    def folder(
        self, folder: Path, engines: Collection[str]
    ) -> tuple[dict[str, dict[str, Measured]], dict[str, float]]:
        """Losses, by engine and text, and accuracies of a 16-bit or quantized model on disk."""
        measured = {}
        if VLLM in engines:
            measured[VLLM] = self._served(folder)
        accuracies: dict[str, float] = {}
        if REFERENCE in engines or self.tasks:
            model = load_model(folder, getattr(torch, self.dtype))
            losses, accuracies = self.model(model, texts=REFERENCE in engines)
            if REFERENCE in engines:
                measured[REFERENCE] = losses
        return measured, accuracies

    def model(
        self, model: Any, *, texts: bool = True
    ) -> tuple[dict[str, Measured], dict[str, float]]:
        """Losses by text, and accuracies, of a `transformers` model, by the reference."""
        device = find_device("auto")
        model = model.to(device)
        losses = {}
        for name, windows in self.windows.items() if texts else ():
            logprobs = reference_logprobs(model, windows.to(device), self.progress)
            losses[name] = _measured(logprobs, windows)
        tasks = self.tasks
        return losses, tasks.accuracies(model, self.tokenizer, self.progress) if tasks else {}

    def _served(self, folder: Path) -> dict[str, Measured]:
        longest = max(windows.shape[1] for windows in self.windows.values())
        arguments = {"dtype": self.dtype, "enforce_eager": True, "max_model_len": longest + 1}
        with vllm_engine(folder, tensor_parallel_size=1, **arguments) as llm:
            return {
                name: _measured(prompt_logprobs(llm, windows, self.progress), windows)
                for name, windows in self.windows.items()
            }


def open_bench(
    folder: Path,
    context: int | None,
    texts: Sequence[str | Path],
    *,
    engine: str,
    dtype: str,
    window: int,
    most_windows: int | None,
    tasks: Tasks | None,
    progress: bool,
) -> Bench:
    """Read and tokenize every text, once.

    Args:
        folder: of the model, for its tokenizer.
        context: tokens that the model can take.
    """
    refuse_unknown(engine, dtype)
    if engine == VLLM:
        require_vllm()
    if not texts:
        raise InputError("No evaluation text: give --text FILE (.txt or .jsonl).")
    twice = [text for number, text in enumerate(texts) if text in texts[:number]]
    if twice:
        raise InputError(f"--text {twice[0]} is given twice: give it once.")
    refuse_no_window(window, most_windows)
    tokenizer = load_tokenizer(folder)
    length = window_length(window, context)
    windows: dict[str, Tensor] = {}
    for text in texts:
        cut = text_windows(text, tokenizer, length, most_windows)
        windows[_name(str(text), windows)] = cut
    return Bench(windows, engine, dtype, tasks, tokenizer, progress)


def device_name() -> str:
    """What measures, for the tables."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def free_memory() -> None:
    """Let go of a row's model before the next one is made."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _name(text: str, taken: dict[str, Tensor]) -> str:
    short = Path(text).stem if Path(text).is_file() else text
    return text if short in taken else short


def _measured(logprobs: Tensor, windows: Tensor) -> Measured:
    return Measured(loss=-float(logprobs.mean()), tokens=logprobs.numel(), windows=len(windows))

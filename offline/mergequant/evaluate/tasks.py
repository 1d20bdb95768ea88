"""Zero-shot accuracies by lm-eval, on the reference arithmetic; the extra `tasks` brings it."""

import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mergequant.errors import InputError

# The paper's figures are lm-eval's normalized accuracy where a task has one: 74.5 for ARC-easy on
# Llama-2-7B is acc_norm, and WinoGrande has acc alone.
_METRICS = ("acc_norm,none", "acc,none")


@dataclass(frozen=True)
class Accuracy:
    """An accuracy and its standard error, both in percent."""

    percent: float
    error: float


def accuracy_of(percent: float, questions: int) -> Accuracy:
    """An accuracy on so many questions: its error is that of a mean of zeros and ones."""
    right = percent / 100
    return Accuracy(percent, 100 * math.sqrt(right * (1 - right) / max(questions - 1, 1)))


class Tasks:
    """Tasks that were found and whose data could be loaded; `accuracies` measures a model.

    Attributes:
        names: as asked for.
    """

    def __init__(self, names: Sequence[str], folder: str | Path | None = None) -> None:
        """Find tasks by name, also in the YAML files of `folder`.

        Raises:
            InputError: lm-eval is missing, a task is unknown, or its data cannot be loaded.
        """
        self.names = list(names)
        if folder is not None and not Path(folder).is_dir():
            raise InputError(f"--task-folder {folder} is not a folder: check the path.")
        try:
            from lm_eval.models.huggingface import HFLM  # needs more than lm_eval alone
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError(
                f"--tasks needs lm-eval ({error.name} is missing): "
                'pip install "mergequant-vllm[tasks]".'
            ) from error
        self._wrap: Any = HFLM
        self._manager: Any = None
        if folder is not None:
            self._manager = TaskManager(include_path=str(folder), include_defaults=False)
        if self._manager is None or set(self.names) - set(self._manager.all_subtasks):
            # lm-eval's own tasks are thousands of files: many seconds.
            self._manager = TaskManager(include_path=None if folder is None else str(folder))
        self._load()

    def _load(self) -> None:
        unknown = [name for name in self.names if name not in self._manager.all_tasks]
        if unknown:
            raise InputError(
                f"Task {unknown[0]!r} is unknown to lm-eval: see `lm-eval ls tasks`, or give the "
                "folder of its YAML file as --task-folder."
            )
        for name in self.names:
            try:
                self._manager.load([name])
            except Exception as error:  # the data set library raises many types
                raise InputError(
                    f"The data of task {name!r} cannot be loaded ({type(error).__name__}): "
                    "check the network, or load it once where there is one."
                ) from error

    def accuracies(self, model: Any, tokenizer: Any, progress: bool = False) -> dict[str, float]:
        """Zero-shot accuracy of a `transformers` model, percent, by task."""
        measured = self.measure(model, tokenizer, progress)
        return {name: accuracy.percent for name, accuracy in measured.items()}

    def measure(self, model: Any, tokenizer: Any, progress: bool = False) -> dict[str, Accuracy]:
        """Zero-shot accuracy of a `transformers` model with its standard error, by task."""
        from lm_eval import evaluate

        loaded = self._manager.load(self.names)
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=0)
        with _quiet(progress):
            wrapped = self._wrap(pretrained=model, tokenizer=tokenizer, batch_size=8)
            wrapped.loglikelihood = partial(wrapped.loglikelihood, disable_tqdm=not progress)
            results = evaluate(wrapped, loaded, bootstrap_iters=0, log_samples=False)
        members = results.get("group_subtasks", {})
        counts = {name: int(x["effective"]) for name, x in results["n-samples"].items()}
        return {
            name: accuracy_of(_percent(name, metrics), questions_of(name, counts, members))
            for name, metrics in results["results"].items()
            if not _is_bare_group(name, metrics, members)
        }


def questions_of(name: str, counts: Mapping[str, int], members: Mapping[str, Any]) -> int:
    """How many questions a task has, or all tasks of a group together."""
    if name in counts:
        return counts[name]
    return sum(questions_of(member, counts, members) for member in members.get(name) or ())


def _is_bare_group(name: str, metrics: Mapping[str, Any], members: Mapping[str, Any]) -> bool:
    """Whether this is a group of tasks that lm-eval gives no figure of its own."""
    return bool(members.get(name)) and not any(metric in metrics for metric in _METRICS)


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Without lm-eval's remarks on a model that is passed as an object; its bars if wanted."""
    told = logging.getLogger("lm_eval")
    level = told.level
    told.setLevel(logging.ERROR)
    try:
        with nullcontext() if progress else redirect_stderr(io.StringIO()):
            yield
    finally:
        told.setLevel(level)


def _percent(name: str, metrics: Mapping[str, Any]) -> float:
    for metric in _METRICS:
        if metric in metrics:
            return 100.0 * float(metrics[metric])
    raise InputError(f"Task {name!r} has no accuracy: leave it out of --tasks.")

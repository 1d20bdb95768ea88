"""Zero-shot accuracy of a served model on the items of a file: lm-eval over vLLM."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# The prompt of lm-eval's own PIQA and ARC, whose items these are with the question put in words.
_TASK = """\
task: {task}
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files: {{test: {items}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query.strip()}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
num_fewshot: 0
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
"""
METRIC = "acc_norm"  # of the choices' log-likelihoods, each divided by its length
_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


class Accuracy(NamedTuple):
    """Percent of items answered right, and its standard error."""

    percent: float
    error: float


def accuracies(model: Path, items: Sequence[Path], limit: int, length: int) -> dict[str, Accuracy]:
    """Accuracy on the first `limit` items of each file, by the file's stem.

    Args:
        model: folder that vLLM serves, in float32 and without compiling.
        items: files of JSON lines with `query`, `choices` and the number of the right one, `gold`.
        limit: items of each file.
        length: context, tokens.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for file in items:
            (folder / f"{file.stem}.yaml").write_text(task(file, folder))
        engine = f"pretrained={model},dtype=float32,enforce_eager=True,max_model_len={length}"
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "vllm"]
        command += ["--model_args", engine, "--tasks", ",".join(file.stem for file in items)]
        command += ["--include_path", str(folder), "--limit", str(limit), "--batch_size", "auto"]
        command += ["--output_path", str(folder / "results")]
        environment = {**_SETTINGS, **os.environ}
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
        (found,) = (folder / "results").rglob("results_*.json")
        return read(json.loads(found.read_text()))


def task(items: Path, folder: Path) -> str:
    """The description of a task, in lm-eval's YAML."""
    return _TASK.format(task=items.stem, folder=folder, items=items.resolve(), metric=METRIC)


def read(record: dict[str, Any]) -> dict[str, Accuracy]:
    """What lm-eval wrote, by task."""
    return {
        name: Accuracy(
            100.0 * float(row[f"{METRIC},none"]), 100.0 * float(row[f"{METRIC}_stderr,none"])
        )
        for name, row in record["results"].items()
    }

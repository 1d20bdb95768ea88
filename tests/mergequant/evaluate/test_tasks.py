"""lm-eval on a task of our own making: no network."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mergequant import InputError
from mergequant.calibration.tokenizer import load_tokenizer
from mergequant.evaluate.perplexity import reference_logits
from mergequant.evaluate.reference_forward import load_model
from mergequant.evaluate.tasks import Tasks, accuracy_of, questions_of

ITEMS = [
    {
        "question": f"{i} The quick brown",
        "choices": [" fox jumps", " dog", " 0123 over"],
        "gold": i % 3,
    }
    for i in range(12)
]
YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files: {{test: {folder}/items.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
{metrics}
"""
MISSING = "lm-eval is not installed: the extra `tasks` brings it"
METRIC = "  - {{metric: {name}, aggregation: mean, higher_is_better: true}}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    for name, metrics in (("plain", ["acc"]), ("both", ["acc", "acc_norm"])):
        lines = "".join(METRIC.format(name=metric) for metric in metrics)
        text = YAML.format(name=f"mergequant_{name}", folder=tmp_path, metrics=lines)
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def choices(model: Any, tokenizer: Any, *, normalized: bool) -> float:
    """Percent of items whose gold choice is likeliest, computed by hand, a sequence at a time."""
    right = 0
    for item in ITEMS:
        scores = []
        for choice in item["choices"]:  # type: ignore[attr-defined]
            start = tokenizer(item["question"])["input_ids"]
            ids = tokenizer(f"{item['question']}{choice}", return_tensors="pt")["input_ids"]
            logprobs = reference_logits(model, ids)[0].log_softmax(-1)
            own = logprobs[:-1].gather(1, ids[0, 1:, None])[len(start) - 1 :]
            scores.append(float(own.sum()) / (len(choice) if normalized else 1))
        right += scores.index(max(scores)) == item["gold"]
    return 100.0 * right / len(ITEMS)


def test_accuracy_is_the_normalized_one_where_there_is_one(llama: Path, folder: Path) -> None:
    pytest.importorskip("lm_eval", reason=MISSING)
    model, tokenizer = load_model(llama), load_tokenizer(llama)
    tasks = Tasks(["mergequant_plain", "mergequant_both"], folder)
    accuracies = tasks.accuracies(model, tokenizer)
    assert accuracies == {
        "mergequant_plain": pytest.approx(choices(model, tokenizer, normalized=False)),
        "mergequant_both": pytest.approx(choices(model, tokenizer, normalized=True)),
    }
    assert tasks.accuracies(model, tokenizer) == accuracies
    measured = tasks.measure(model, tokenizer)["mergequant_plain"]
    assert measured == accuracy_of(measured.percent, len(ITEMS))


def test_a_group_is_measured_as_its_tasks_are(llama: Path, folder: Path) -> None:
    pytest.importorskip("lm_eval", reason=MISSING)
    group = "group: ours\ntask: [mergequant_plain, mergequant_both]\n"
    (folder / "ours.yaml").write_text(
        f"{group}aggregate_metric_list:\n  - {{metric: acc, weight_by_size: true}}\n"
    )
    (folder / "bare.yaml").write_text(group.replace("ours", "bare"))
    model, tokenizer = load_model(llama), load_tokenizer(llama)
    alone = Tasks(["bare"], folder).measure(model, tokenizer)  # has no figure of its own
    assert set(alone) == {"mergequant_plain", "mergequant_both"}
    measured = Tasks(["ours"], folder).measure(model, tokenizer)
    assert {name: measured[name] for name in alone} == alone
    assert measured["ours"] == accuracy_of(measured["ours"].percent, 2 * len(ITEMS))


def test_an_unknown_task_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = pytest.importorskip("lm_eval.tasks", reason=MISSING)

    def ours(include_path: str, include_defaults: bool = True) -> Any:
        return manager(include_path=include_path, include_defaults=False)

    manager = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", ours)  # lm-eval's own are thousands of files
    with pytest.raises(InputError, match="Task 'mergequant_gone' is unknown to lm-eval"):
        Tasks(["mergequant_plain", "mergequant_gone"], folder)


def test_data_that_cannot_be_loaded_are_told_at_once(folder: Path) -> None:
    pytest.importorskip("lm_eval", reason=MISSING)
    (folder / "items.jsonl").unlink()
    with pytest.raises(InputError, match="The data of task 'mergequant_plain' cannot be loaded"):
        Tasks(["mergequant_plain"], folder)


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(InputError, match=r'pip install "mergequant-vllm\[tasks\]"'):
        Tasks(["piqa"])


def test_an_accuracys_error_is_that_of_a_mean() -> None:
    answers = torch.tensor([1.0] * 30 + [0.0] * 10, dtype=torch.float64)
    accuracy = accuracy_of(75.0, 40)
    assert accuracy.error == pytest.approx(100 * float(answers.std()) / 40**0.5)
    assert accuracy_of(100.0, 40).error == 0 == accuracy_of(0.0, 1).error


def test_a_group_has_the_questions_of_its_tasks() -> None:
    counts = {"a": 3, "b": 4, "alone": 5}
    members = {"mmlu": ["stem", "b"], "stem": ["a"], "alone": []}
    assert questions_of("mmlu", counts, members) == 7
    assert questions_of("alone", counts, members) == 5

"""Zero-shot items as a task of lm-eval."""

from pathlib import Path

import pytest

from benchmarks.method.zero_shot import Accuracy, read, task


def test_a_task_reads_the_items_where_they_are(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    told = yaml.safe_load(task(tmp_path / "piqa.jsonl", tmp_path))
    assert told["task"] == "piqa" and told["num_fewshot"] == 0
    assert told["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "piqa.jsonl")}
    assert told["doc_to_text"].endswith("\nAnswer:") and "{{query.strip()}}" in told["doc_to_text"]
    assert [x["metric"] for x in told["metric_list"]] == ["acc_norm"]


def test_accuracy_is_read_in_percent_with_its_standard_error() -> None:
    row = {"alias": "piqa", "acc_norm,none": 0.66, "acc_norm_stderr,none": 0.021}
    assert read({"results": {"piqa": row}}) == {"piqa": Accuracy(66.0, pytest.approx(2.1))}

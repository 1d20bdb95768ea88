"""Tables of records made by hand: Markdown to the letter."""

import json

from mergequant import Options
from mergequant.ablation.measure import Measured
from mergequant.ablation.records import Record
from mergequant.ablation.results import Results, as_json, as_markdown, line
from mergequant.ablation.rows import FULL, Row
from mergequant.ablation.tables import Table


def record(key: str, losses: dict[str, float], **changed: object) -> Record:
    """A record whose text `wiki` has these losses, by engine."""
    made = {
        "key": key,
        "options": None,
        "measured": {
            engine: {"wiki": Measured(loss=loss, tokens=10, windows=1)}
            for engine, loss in losses.items()
        },
        "accuracies": {},
        "growth": 0.0,
        "seconds": {"quantize": 0.0, "evaluate": 1.0},
        "clips": {},
        "device": "CPU",
    }
    return Record.model_validate({**made, **changed})


ROWS = (
    Row(FULL, "full precision", None, "FP16"),
    Row("tensor", "static per tensor", Options(), "QuaRot & Static"),
    Row("shaped", "+ reconstruction", Options(), None),
    Row("broken", "+ clipping", Options(), "+ Clipping"),
    Row("later", "+ compensation", Options(), None),
)
TABLE = Table("table4", "Table 4: step by step", ROWS)


def results(paper_model: str | None = None) -> Results:
    seconds = {"calibration": 60.0, "codes": 90.0, "quantize": 180.0, "evaluate": 1.0}
    records = [
        record(FULL, {"vllm": 1.0, "transformers": 1.5}, accuracies={"piqa": 80.0, "own": 60.0}),
        record("tensor", {"transformers": 11.0}, accuracies={"piqa": 50.0, "own": 30.0}),
        record("shaped", {"vllm": 1.25}, growth=12.5, seconds=seconds),
    ]
    by_key, failed = {x.key: x for x in records}, {"broken": "InputError: no"}
    return Results("tiny", paper_model, by_key, failed, ["wiki"], "A note.")


MARKDOWN = """\
# Ablation of tiny

A note.

## Table 4: step by step

| variant | wiki: loss | excess | perplexity | K | piqa | own | average | \
paper, Llama-3-8B: WikiText-2 / C4 | paper: average | measured by |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| full precision | 1.0000 | +0.0000 | 2.718 | +0.0% | 80.00 | 60.00 | 70.00 | \
6.14 / 9.45 | 72.77 | vllm, CPU |
| static per tensor | 11.0000 | +9.5000 | 5.99e+04 | +0.0% | 50.00 | 30.00 | 40.00 | \
18.23 / 23.56 | 49.00 | transformers, CPU |
| + reconstruction | 1.2500 | +0.2500 | 3.490 | +12.5% | - | - | - |  |  | vllm, CPU |
| + clipping | - | - | - | - | - | - | - | 9.20 / 13.40 | 64.26 | failed |
| + compensation | - | - | - | - | - | - | - |  |  | not run |

## Table 8: time

| row | calibration, min | codes, min | fine-tuning, min | whole quantizer, min |
| --- | ---: | ---: | ---: | ---: |
| table4: static per tensor | 0.00 | 0.00 | 0.00 | 0.00 |
| table4: + reconstruction | 1.00 | 1.50 | 0.00 | 3.00 |
"""


def test_markdown() -> None:
    assert as_markdown([TABLE], results()) == MARKDOWN


def test_the_papers_accuracies_stand_beside_ours_for_its_models_only() -> None:
    lines = as_markdown([TABLE], results("Llama-3-8B")).splitlines()
    assert "| 80.00 (80.74) | 60.00 | 70.00 |" in lines[8]
    assert "| - (74.70) | - | - | 9.20 / 13.40 |" in lines[11]


def test_the_papers_times_stand_below_ours_for_its_models_only() -> None:
    last = as_markdown([TABLE], results("Llama-3-8B")).splitlines()[-1]
    assert last == "| paper, Llama-3-8B | 5.9 |  | 102 |  |"
    assert "paper" not in as_markdown([TABLE], results()).partition("Table 8")[2]


def test_excess_is_against_full_precision_by_the_same_engine() -> None:
    wiki = line("table4", ROWS[1], results())["texts"]["wiki"]
    assert wiki["excess"] == 11.0 - 1.5


def test_json_has_all_lines_rows_and_failures() -> None:
    document = json.loads(json.dumps(as_json([TABLE], results())))
    assert [x["key"] for x in document["tables"][0]["lines"]] == [row.key for row in ROWS]
    assert document["tables"][0]["lines"][3]["failed"] == "InputError: no"
    assert set(document["rows"]) == {FULL, "tensor", "shaped"}


def test_an_overflowing_loss_has_an_infinite_perplexity() -> None:
    assert Measured(loss=800.0, tokens=1, windows=1).perplexity == float("inf")

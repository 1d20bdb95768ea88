"""The paper's tables with one model's results: as JSON has them, and as Markdown prints them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mergequant.ablation import paper
from mergequant.ablation.measure import Measured
from mergequant.ablation.records import Record
from mergequant.ablation.rows import FULL, Row
from mergequant.ablation.tables import Table

_STAGES = ("calibration", "codes", "compensation")


@dataclass(frozen=True)
class Results:
    """What the tables are made of.

    Attributes:
        model: what the source model is called.
        paper_model: which model of the paper it has the shape of, or None.
        records: finished rows, by key.
        failed: why a row failed, by key; a row in neither has not run yet.
        texts: names of the evaluated texts, in order.
        note: how the rows were made and measured, one sentence.
    """

    model: str
    paper_model: str | None
    records: Mapping[str, Record]
    failed: Mapping[str, str]
    texts: Sequence[str]
    note: str


def as_json(tables: Sequence[Table], results: Results) -> dict[str, Any]:
    """Every line of every table, and the records of the rows."""
    return {
        "model": results.model,
        "paper_model": results.paper_model,
        "note": results.note,
        "tables": [
            {
                "name": table.name,
                "title": table.title,
                "paper_model": paper.shown_model(table.name, results.paper_model),
                "lines": [line(table.name, row, results) for row in table.rows],
            }
            for table in tables
        ],
        "failed": dict(results.failed),
        "rows": {key: row.model_dump(mode="json") for key, row in results.records.items()},
    }


def as_markdown(tables: Sequence[Table], results: Results) -> str:
    """Every table, and the seconds of all rows (the paper's Table 8)."""
    parts = [f"# Ablation of {results.model}", results.note]
    for table in tables:
        parts += [f"## {table.title}", _table(table, results)]
    parts += ["## Table 8: time", _times(tables, results)]
    return "\n\n".join(parts) + "\n"


def line(table: str, row: Row, results: Results) -> dict[str, Any]:
    """One line of a table: ours, and the paper's where it has the row.

    `excess` is the loss above full precision by the same engine on the same tokens, nats a token.
    """
    theirs = paper.figures(table, paper.shown_model(table, results.paper_model), row.paper)
    line: dict[str, Any] = {
        "label": row.label,
        "key": row.key,
        "failed": results.failed.get(row.key),
        "paper": None
        if theirs is None
        else {
            "wikitext": theirs.wikitext,
            "c4": theirs.c4,
            "accuracies": dict(zip(paper.TASKS, theirs.accuracies, strict=False)),
            "average": theirs.average,
        },
    }
    record = results.records.get(row.key)
    if record is None:
        return {**line, "texts": {}, "accuracies": {}, "growth": None, "measured_by": None}
    engine = next(iter(record.measured))
    return {
        **line,
        "texts": {
            name: _text(measured, results.records.get(FULL), engine, name)
            for name, measured in record.measured[engine].items()
        },
        "accuracies": record.accuracies,
        "growth": record.growth,
        "measured_by": f"{engine}, {record.device}",
    }


def _text(measured: Measured, full: Record | None, engine: str, name: str) -> dict[str, Any]:
    reference = None if full is None else full.measured.get(engine, {}).get(name)
    return {
        "loss": measured.loss,
        "excess": None if reference is None else measured.loss - reference.loss,
        "perplexity": measured.perplexity,
    }


def _table(table: Table, results: Results) -> str:
    lines = [line(table.name, row, results) for row in table.rows]
    tasks = list(dict.fromkeys(name for x in lines for name in x["accuracies"]))
    model = paper.shown_model(table.name, results.paper_model)
    head = ["variant"]
    for text in results.texts:
        head += [f"{text}: loss", "excess", "perplexity"]
    head += ["K", *tasks, *(["average"] if tasks else [])]
    if model:
        head.append(f"paper, {model}: WikiText-2 / C4")
        head += ["paper: average"] if tasks else []
    head.append("measured by")
    same = model == results.paper_model
    return _markdown(head, [_cells(x, results.texts, tasks, model, same) for x in lines])


def _cells(
    x: dict[str, Any], texts: Sequence[str], tasks: list[str], model: str | None, same: bool
) -> list[str]:
    """A line's cells; the paper's accuracies beside ours are of the `same` model or left out."""
    theirs = x["paper"] or {}
    cells = [x["label"]]
    for text in texts:
        result = x["texts"].get(text, {})
        cells += [
            _number(result.get("loss"), ".4f"),
            _number(result.get("excess"), "+.4f"),
            _number(
                result.get("perplexity"), ".3f" if result.get("perplexity", 0) < 1e4 else ".2e"
            ),
        ]
    cells.append(_number(x["growth"], "+.1f", "%"))
    for task in tasks:
        known = theirs.get("accuracies", {}).get(task) if same else None
        beside = "" if known is None else f" ({known:.2f})"
        cells.append(_number(x["accuracies"].get(task), ".2f") + beside)
    if tasks:
        cells.append(_number(fmean(x["accuracies"].values()) if x["accuracies"] else None, ".2f"))
    if model:
        both = (theirs.get("wikitext"), theirs.get("c4"))
        cells.append(" / ".join(_number(y, ".2f") for y in both) if theirs else "")
        cells += [_number(theirs.get("average"), ".2f") if theirs else ""] if tasks else []
    cells.append("failed" if x["failed"] else x["measured_by"] or "not run")
    return cells


def _times(tables: Sequence[Table], results: Results) -> str:
    """Minutes of each row's stages; the paper's Table 8 has calibration and fine-tuning."""
    labels: dict[str, str] = {}
    for table in tables:
        for row in table.rows:
            if row.options is not None:
                labels.setdefault(row.key, f"{table.name}: {row.label}")
    head = ["row", "calibration, min", "codes, min", "fine-tuning, min", "whole quantizer, min"]
    rows = []
    for key, label in labels.items():
        if key in results.records:
            seconds = results.records[key].seconds
            stages = [_number(seconds.get(stage, 0.0) / 60, ".2f") for stage in _STAGES]
            rows.append([label, *stages, _number(seconds["quantize"] / 60, ".2f")])
    model = results.paper_model
    if model in paper.TABLE8:
        calibration, tuning = paper.TABLE8[model]
        rows.append([f"paper, {model}", f"{calibration:.1f}", "", f"{tuning * 60:.0f}", ""])
    return _markdown(head, rows)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _markdown(head: list[str], rows: Sequence[Sequence[str]]) -> str:
    ruled = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ruled, *rows))

"""One row: quantize, measure, sum up the report."""

import json
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mergequant.ablation.baselines import Baseline
from mergequant.ablation.measure import REFERENCE, Bench, Measured, device_name
from mergequant.ablation.records import Record, Shelf
from mergequant.ablation.rows import Row
from mergequant.ablation.study import Subject
from mergequant.model.reader import CONFIG
from mergequant.options import Options
from mergequant.output.durable_files import write_json
from mergequant.output.writer import REPORT
from mergequant.quantizer import in_memory
from mergequant.quantizer import run as pipeline

Report = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Outcome:
    measured: dict[str, dict[str, Measured]]
    accuracies: dict[str, float]
    report: Report
    quantized: float  # seconds


def run_row(
    row: Row, engines: Collection[str], subject: Subject, bench: Bench, shelf: Shelf, keep: bool
) -> Record:
    """Quantize as the row says and measure.

    Args:
        engines: what measures; of a row without a checkpoint, the reference.
        keep: leave the checkpoint in `shelf.checkpoint`.
    """
    began = time.monotonic()
    if row.options is None:
        measured, accuracies = bench.folder(subject.folder, engines)
        outcome = _Outcome(measured, accuracies, [], 0.0)
    elif row.baseline.exported:
        outcome = _through_checkpoint(row.key, row.options, engines, subject, bench, shelf)
    else:
        outcome = _in_memory(row.options, row.baseline, subject, bench)
    whole = time.monotonic() - began
    record = Record(
        key=row.key,
        options=row.options_as_json,
        measured=outcome.measured,
        accuracies=outcome.accuracies,
        growth=_growth(outcome.report, subject.widths["hidden"]),
        seconds={
            **_seconds(outcome.report),
            "quantize": round(outcome.quantized, 3),
            "evaluate": round(whole - outcome.quantized, 3),
        },
        clips=_clips(outcome.report),
        device=device_name(),
    )
    shelf.write(record)
    if row.options is not None and not keep:
        shutil.rmtree(shelf.checkpoint(row.key), ignore_errors=True)
        _made_with(shelf.checkpoint(row.key)).unlink(missing_ok=True)
    return record


def _through_checkpoint(
    key: str,
    options: Options,
    engines: Collection[str],
    subject: Subject,
    bench: Bench,
    shelf: Shelf,
) -> _Outcome:
    """Write a checkpoint, or finish the one that an interrupted run left; measure it from disk."""
    folder, began = shelf.checkpoint(key), time.monotonic()
    _prepare(folder, options)
    if not (folder / CONFIG).exists():
        pipeline.quantize(
            subject.folder, folder, subject.calibration, options, progress=bench.progress
        )
    quantized = time.monotonic() - began
    report = [json.loads(line) for line in (folder / REPORT).read_text().splitlines()]
    measured, accuracies = bench.folder(folder, engines)
    return _Outcome(measured, accuracies, report, quantized)


def _in_memory(options: Options, baseline: Baseline, subject: Subject, bench: Bench) -> _Outcome:
    began = time.monotonic()
    model, report = in_memory.quantize_in_memory(
        subject.folder, subject.calibration, options, baseline.change, progress=bench.progress
    )
    quantized = time.monotonic() - began
    losses, accuracies = bench.model(model)
    return _Outcome({REFERENCE: losses}, accuracies, report, quantized)


def _prepare(folder: Path, options: Options) -> None:
    """Remove what was made with other options; say with which ones what follows is made."""
    wanted = options.model_dump(mode="json")
    path = _made_with(folder)
    if not path.exists() or json.loads(path.read_text()) != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)


def _made_with(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.options.json")


def _growth(report: Report, hidden: int) -> float:
    """Return by how many percent reconstruction widened norm-fed inputs, their mean."""
    static = [line for line in report if line["activations"] == "static"]
    shaped = [line.get("reconstruction") for line in static]
    columns = [hidden if shape is None else int(shape["columns"]) for shape in shaped]
    return 100.0 * (fmean(columns) / hidden - 1.0) if columns else 0.0


def _seconds(report: Report) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for line in report:
        for stage, seconds in line["seconds"].items():
            sums[stage] += float(seconds)
    return {stage: round(seconds, 3) for stage, seconds in sums.items()}


def _clips(report: Report) -> dict[str, list[float]]:
    """One ratio a linear and block, blocks in order; per-token linears only."""
    clips: dict[str, list[float]] = defaultdict(list)
    for line in report:
        if not isinstance(line["clip"], Mapping):
            name = re.split(r"\.\d+\.", line["linear"], maxsplit=1)[-1]
            clips[name].append(float(line["clip"]))
    return dict(clips)

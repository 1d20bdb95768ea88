"""Everything that is checked and read once, before the first row runs."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergequant.ablation import paper as published
from mergequant.ablation.measure import Bench
from mergequant.ablation.one_row import Source
from mergequant.ablation.records import Study, versions
from mergequant.ablation.rows import NAMES, Shapes, Table, tables
from mergequant.architecture import Architecture, widths
from mergequant.checkpoint import Reader
from mergequant.contract import reconstructed_columns
from mergequant.corpus import read_source, sha256_of
from mergequant.errors import InputError
from mergequant.fingerprint import file_sha256
from mergequant.options import Options
from mergequant.pipeline import open_model


@dataclass(frozen=True)
class Subject:
    """The model under study.

    Attributes:
        name: what tables call it.
        paper_model: which model of the paper it has the shape of, or None.
    """

    name: str
    paper_model: str | None
    reader: Reader
    architecture: Architecture
    source: Source


def subject(model: str | Path, calibration: Sequence[str | Path]) -> Subject:
    """Find a model and check that it can be quantized."""
    if not calibration:
        raise InputError("No calibration text: give --calibration FILE (.txt or .jsonl).")
    plain = Options(rotation="none")
    reader, architecture, _ = open_model(model, plain)
    return Subject(
        name=Path(model).resolve().name if Path(model).is_dir() else str(model),
        paper_model=published.model_of(reader.config),
        reader=reader,
        architecture=architecture,
        source=Source(reader.folder, calibration, widths(reader.config)["hidden"]),
    )


def chosen_tables(
    names: Sequence[str],
    figure1: bool,
    base: Options,
    subject: Subject,
    shapes: Shapes | None = None,
) -> list[Table]:
    """The tables asked for, all if none is; each row's options are checked.

    Args:
        shapes: how rows are reconstructed, once that is decided.

    Raises:
        InputError: a table is unknown, or the model cannot be quantized as a row says.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise InputError(f"--paper {unknown[0]!r} is unknown: choose of {', '.join(NAMES)}.")
    wanted = {*(names or NAMES), *(["figure1"] if figure1 else [])}
    config = subject.reader.config
    every = tables(base, widths(config), shapes)
    if base.reconstruction == "pad":
        reconstructed_columns(base, subject.source.hidden)
    return [table for name, table in every.items() if name in wanted]


def study_of(subject: Subject, bench: Bench) -> Study:
    """What the rows of this run have in common."""
    reader = subject.reader
    config = json.dumps(reader.config, sort_keys=True).encode()
    texts = {str(name): read_source(str(name)).text() for name in subject.source.calibration}
    tasks = bench.tasks
    return Study(
        versions=versions(tuple(["vllm"] * (bench.engine == "vllm") + ["lm-eval"] * bool(tasks))),
        config_sha256=hashlib.sha256(config).hexdigest(),
        weights_sha256={file.name: file_sha256(file) for file in reader.weight_files()},
        calibration_sha256={
            name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()
        },
        texts_sha256={name: sha256_of(windows) for name, windows in bench.windows.items()},
        settings={
            "engine": bench.engine,
            "dtype": bench.dtype,
            "tasks": list(tasks.names) if tasks else [],
        },
    )

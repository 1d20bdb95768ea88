"""The model under study, and what all rows have in common: checked before the first row runs."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue

from mergequant.ablation import paper
from mergequant.ablation.measure import VLLM, Bench
from mergequant.calibration.sources import calibration_sources
from mergequant.calibration.text import sha256_of
from mergequant.model.architecture import Architecture
from mergequant.model.reader import Reader
from mergequant.model.shapes import widths
from mergequant.options import Options
from mergequant.output.fingerprint import config_sha256, unequal, versions_of, weights_sha256
from mergequant.quantizer.prepare import open_folder, windows_of


@dataclass(frozen=True)
class Subject:
    """The model under study, and its calibration text.

    Attributes:
        name: what tables call it.
        paper_model: which model of the paper it has the shape of, or None.
        widths: of its spaces, see `mergequant.model.architecture.widths`.
        calibration: names of the text's sources.
        calibration_sha256: of each source, by name.
    """

    name: str
    paper_model: str | None
    reader: Reader
    architecture: Architecture
    widths: Mapping[str, int]
    calibration: Sequence[str | Path]
    calibration_sha256: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """Folder of the model on disk."""
        return self.reader.folder


def subject_of(model: str | Path, calibration: Sequence[str | Path]) -> Subject:
    """Find a model and check that it can be quantized."""
    sources = calibration_sources(calibration)
    reader, architecture = open_folder(model)
    return Subject(
        name=Path(model).resolve().name if Path(model).is_dir() else str(model),
        paper_model=paper.model_of(reader.config),
        reader=reader,
        architecture=architecture,
        widths=widths(reader.config),
        calibration=calibration,
        calibration_sha256={
            source.name: hashlib.sha256(source.text().encode()).hexdigest() for source in sources
        },
    )


def with_samples(base: Options, subject: Subject) -> Options:
    """`base` with as many windows for GPTQ in each row as its whole method would take by default.

    What is trained and what is not would differ in them too.
    """
    if base.gptq_samples is not None:
        return base
    samples, _ = windows_of(subject.reader, base)
    return base.model_copy(update={"gptq_samples": samples.hessians})


class Study(BaseModel):
    """All that the rows of one OUTPUT have in common; rows of another study are not comparable.

    Attributes:
        versions: of the libraries that compute, by package.
        config_sha256: of the source model's configuration.
        weights_sha256: of each of its weight files, by name.
        calibration_sha256: of each calibration text, by name.
        texts_sha256: of each evaluated text's windows, by name.
        settings: engine, dtype, tasks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    versions: dict[str, str]
    config_sha256: str
    weights_sha256: dict[str, str]
    calibration_sha256: dict[str, str]
    texts_sha256: dict[str, str]
    settings: dict[str, JsonValue]

    def difference(self, given: "Study") -> str | None:
        """The first thing in which they differ, as a phrase; None if they agree."""
        if self.config_sha256 != given.config_sha256:
            return "another model's config.json"
        for field, what in (
            ("weights_sha256", "weights"),
            ("calibration_sha256", "calibration text"),
            ("texts_sha256", "evaluation text or windows"),
            ("settings", "setting"),
            ("versions", "release of"),
        ):
            for name, _, _ in unequal(getattr(self, field), getattr(given, field)):
                return f"another {what} ({name})"
        return None


def study_of(subject: Subject, bench: Bench) -> Study:
    """What the rows of this run have in common."""
    tasks = bench.tasks
    extras = ["vllm"] * (bench.engine == VLLM) + ["lm-eval"] * bool(tasks)
    return Study(
        versions=versions_of("torch", "transformers", *extras),
        config_sha256=config_sha256(subject.reader.config),
        weights_sha256=weights_sha256(subject.reader.weight_files()),
        calibration_sha256=dict(subject.calibration_sha256),
        texts_sha256={name: sha256_of(windows) for name, windows in bench.windows.items()},
        settings={
            "engine": bench.engine,
            "dtype": bench.dtype,
            "tasks": list(tasks.names) if tasks else [],
        },
    )


def note_of(base: Options, bench: Bench) -> str:
    """How the rows of this run are made and measured, and what their columns are."""
    windows = bench.windows.items()
    texts = ", ".join(f"{x.shape[0]} x {x.shape[1]} tokens of {name}" for name, x in windows)
    return (
        f"Calibrated on {base.statistics_samples} (GPTQ: {base.gptq_samples}) windows of "
        f"{base.sequence_length} tokens, weight steps by {base.weight_search}; evaluated on "
        f"{texts}. Loss in nats a token, excess above full precision by the same engine; K: by how "
        "much reconstruction widens the linears behind norms. `transformers` is the reference "
        "arithmetic, which also gives the tasks' percentages."
    )

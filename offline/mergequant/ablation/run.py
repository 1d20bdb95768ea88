"""`mergequant ablate`: rows one after another, each kept as soon as it is finished."""

import logging
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from mergequant.ablation.measure import REFERENCE, VLLM, Bench, free_memory, open_bench
from mergequant.ablation.one_row import run_row
from mergequant.ablation.plots import draw, require_matplotlib
from mergequant.ablation.reconstruction import describe, kept_shapes
from mergequant.ablation.records import Record, Shelf, open_shelf
from mergequant.ablation.results import Results, as_json, as_markdown
from mergequant.ablation.rows import FULL, Row, Shapes
from mergequant.ablation.study import Subject, note_of, study_of, subject_of, with_samples
from mergequant.ablation.survey import kept_survey
from mergequant.ablation.tables import CHOICES, Table, chosen_tables, distinct
from mergequant.evaluate.perplexity import PUBLISHED_WINDOW
from mergequant.evaluate.tasks import Tasks
from mergequant.options import Options
from mergequant.output.durable_files import write_durably, write_json
from mergequant.quantizer.prepare import find_device

logger = logging.getLogger("mergequant")


@dataclass(frozen=True)
class Ablation:
    """What was measured and written.

    Attributes:
        markdown: all tables, as in OUTPUT/ablation.md.
        failed: why a row failed, by key; the other rows are in the tables.
        figures: plots, if they were asked for.
    """

    output: Path
    markdown: str
    failed: dict[str, str]
    figures: list[Path]


def ablate(
    model: str | Path,
    output: str | Path,
    calibration: Sequence[str | Path],
    texts: Sequence[str | Path],
    *,
    paper: Sequence[str] = (),
    tasks: Sequence[str] = (),
    task_folder: str | Path | None = None,
    plots: bool = False,
    engine: str = VLLM,
    dtype: str = "float32",
    window: int = PUBLISHED_WINDOW,
    most_windows: int | None = None,
    base: Options | None = None,
    keep: bool = False,
    progress: bool = True,
) -> Ablation:
    """Measure the method step by step, as the paper's Tables 1, 4, 5, 7 and 8 do.

    A run that was interrupted is continued by the same call: finished rows are kept in
    `output`/rows, and finished blocks of the row that was running in `output`/checkpoints.

    Args:
        model: folder or hub id of a 16- or 32-bit model of a known architecture.
        output: folder to make, or one whose run is to be continued or gets further tables.
        calibration: text files (.txt, .jsonl) or data set names; several are mixed.
        texts: evaluated texts, a column each.
        paper: of `table1`, `table4`, `table5`, `table7`; all of these if empty; `outliertune`.
        tasks: names of lm-eval's tasks, zero-shot.
        task_folder: where YAML files of further tasks are.
        plots: draw the paper's Figures 1, 2c, 5, 6 and 7.
        engine: `vllm` serves the rows that have a checkpoint; `transformers` is the reference
            forward, and measures the others in any case.
        dtype: of everything that is not quantized.
        window: tokens in an evaluated window.
        most_windows: use only the first so many of each text.
        base: samples, seed, device, search of weight steps, and the manner of reconstruction and
            compensation; what a row is about it sets itself.
        keep: leave the rows' checkpoints in `output`/checkpoints.

    Raises:
        InputError: the input is at fault; no row has run.
    """
    base = base or Options()
    find_device(base.device)
    if plots:
        require_matplotlib()
    subject = subject_of(model, calibration)
    base = with_samples(base, subject)
    rough = chosen_tables(paper, plots, base, subject.widths)
    bench = open_bench(
        subject.folder,
        subject.reader.config.get("max_position_embeddings"),
        texts,
        engine=engine,
        dtype=dtype,
        window=window,
        most_windows=most_windows,
        tasks=Tasks(tasks, task_folder) if tasks else None,
        progress=progress,
    )
    with open_shelf(Path(output), study_of(subject, bench)) as shelf:
        file = Path(output) / "reconstruction.json"
        shapes = kept_shapes(file, subject.folder, calibration, base, rough, progress)
        tables = chosen_tables(paper, plots, base, subject.widths, shapes)
        run = _Run(subject, tables, bench, shelf, base, shapes, keep)
        run.all_rows()
        figures = run.plots() if plots else []
        return Ablation(Path(output), run.publish(), run.failed, figures)


@dataclass
class _Run:
    subject: Subject
    tables: list[Table]
    bench: Bench
    shelf: Shelf
    base: Options
    shapes: Shapes
    keep: bool
    records: dict[str, Record] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def all_rows(self) -> None:
        """Run every row that is not finished; one that fails leaves the others."""
        rows = distinct(self.tables)
        engines = self._engines(rows)
        waiting = [row for row in rows if not self._is_finished(row, engines[row.key])]
        if len(waiting) < len(rows):
            logger.info("%d of %d rows are finished", len(rows) - len(waiting), len(rows))
        with tqdm(waiting, unit="row", disable=not self.bench.progress) as bar:
            for number, row in enumerate(bar, start=1):
                bar.set_description(f"Row {number}/{len(waiting)}: {row.key}")
                self._one_row(row, engines[row.key])
                free_memory()
                self.publish()

    def _engines(self, rows: Sequence[Row]) -> dict[str, set[str]]:
        """What measures each row: full precision, whatever measures a row to be compared."""
        usual = self.bench.engine
        engines = {x.key: {usual if x.baseline.exported else REFERENCE} for x in rows if x.options}
        return {FULL: {usual}.union(*engines.values()), **engines}

    def _is_finished(self, row: Row, engines: set[str]) -> bool:
        record = self.shelf.read(row.key, row.options_as_json)
        if record is None or not engines <= record.measured.keys():
            return False
        self.records[row.key] = record
        return True

    def _one_row(self, row: Row, engines: set[str]) -> None:
        try:
            self.records[row.key] = run_row(
                row, engines, self.subject, self.bench, self.shelf, self.keep
            )
        except Exception as error:
            if row.key == FULL:  # no row would have anything to be compared with
                raise
            path = self.shelf.write_error(row.key, traceback.format_exc())
            self.failed[row.key] = f"{type(error).__name__}: {error}"
            logger.warning("Row %s failed, see %s: %s", row.key, path, error)

    def publish(self) -> str:
        """Write the tables of what is finished; returns the Markdown."""
        results = Results(
            model=self.subject.name,
            paper_model=self.subject.paper_model,
            records=self.records,
            failed=self.failed,
            texts=list(self.bench.windows),
            note=f"{note_of(self.base, self.bench)} {describe(self.shapes)}".rstrip(),
        )
        markdown = as_markdown([x for x in self.tables if x.name in CHOICES], results)
        output = self.shelf.output
        write_durably(output / "ablation.md", lambda path: path.write_text(markdown))
        write_json(output / "ablation.json", as_json(self.tables, results))
        return markdown

    def plots(self) -> list[Path]:
        """Draw the figures."""
        subject = self.subject
        surveyed = kept_survey(
            self.shelf.output / "survey.safetensors",
            subject.reader,
            subject.architecture,
            subject.calibration,
            self.base,
            self.bench.progress,
        )
        return draw(
            self.shelf.output,
            subject.name,
            self.tables,
            self.records,
            surveyed,
            subject.architecture,
        )

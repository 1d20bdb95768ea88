"""The paper's Figures 1, 2c, 5, 6 and 7 of one model; needs matplotlib."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from mergequant.ablation.records import Record
from mergequant.ablation.rows import FULL, Row
from mergequant.ablation.survey import Survey
from mergequant.ablation.tables import FIGURE1, Table
from mergequant.errors import InputError
from mergequant.model.architecture import Architecture
from mergequant.options import Options


def require_matplotlib() -> None:
    """Raise InputError if figures cannot be drawn."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise InputError(
            '--plots needs matplotlib: pip install "mergequant-vllm[plots]".'
        ) from error
    mpl.use("Agg")


def draw(
    output: Path,
    model: str,
    tables: Sequence[Table],
    records: Mapping[str, Record],
    survey: Survey | None,
    architecture: Architecture,
) -> list[Path]:
    """Draw every figure for which there is something to draw; returns the files."""
    require_matplotlib()
    readers = {x.space: x.title for x in architecture.readers()}
    names = {x.name: x.short for x in architecture.linears}
    drawn = {
        "figure-1-calibrations.png": _figure1(model, tables, records),
        "figure-2c-reconstruction.png": survey and _figure2c(model, survey, readers),
        "figure-5-6-channels.png": survey and _figure5(model, survey.largest, readers),
        "figure-7-clips.png": _figure7(model, tables, records, names),
    }
    return [_save(output / name, figure) for name, figure in drawn.items() if figure is not None]


def _save(path: Path, figure: Any) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _figure1(model: str, tables: Sequence[Table], records: Mapping[str, Record]) -> Any | None:
    """Bars of three calibrations, each without and with rotation: PIQA if measured, else loss."""
    from matplotlib import pyplot

    rows = [row for table in tables if table.name == FIGURE1 for row in table.rows]
    rows = [row for row in rows if row.key in records]
    quantized = [row for row in rows if row.key != FULL]
    if not quantized:
        return None
    unit, value = _scale(records)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    kinds = list(dict.fromkeys(_kind(row) for row in quantized))
    for side, rotated in ((-0.2, False), (0.2, True)):
        half = [row for row in quantized if (_kind(row) != row.label) == rotated]
        places = [kinds.index(_kind(row)) + side for row in half]
        label = "with rotation" if rotated else "no rotation"
        heights = [value(records[row.key]) for row in half]
        axes.bar_label(axes.bar(places, heights, width=0.4, label=label), fmt="%.3g")
    if FULL in records:
        axes.axhline(value(records[FULL]), color="black", linestyle="--", label="full precision")
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set(title=f"{model}: calibrations of 4-bit activations", ylabel=unit)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _kind(row: Row) -> str:
    return row.label.removesuffix(" + rotation")


def _scale(records: Mapping[str, Record]) -> tuple[str, Callable[[Record], float]]:
    """What Figure 1 shows, and how to read it from a record."""
    tasks = next(iter(records.values())).accuracies
    if "piqa" in tasks:
        return "accuracy on PIQA, %", lambda record: record.accuracies["piqa"]
    if tasks:
        return "accuracy, mean of tasks, %", lambda record: fmean(record.accuracies.values())
    return "loss, mean of texts, nats a token", _loss


def _loss(record: Record) -> float:
    texts = next(iter(record.measured.values()))
    return fmean(measured.loss for measured in texts.values())


def _figure2c(model: str, survey: Survey, readers: Mapping[str, str]) -> Any:
    """Folded weight columns' magnitudes before and after reconstruction, on one scale."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    heights: tuple[tuple[str, Tensor], ...] = (
        ("after migration", survey.before),
        ("after dimension reconstruction", survey.after),
    )
    for axes, (title, columns) in zip(panels, heights, strict=True):
        axes.vlines(range(len(columns)), 0, columns.tolist(), linewidth=0.8)
        axes.set(title=f"{title}: {len(columns)} columns", xlabel="column", ylim=(0, None))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("largest |s W| of a column")
    figure.suptitle(f"{model}: weights of {readers[survey.space]} in block {survey.block}")
    return figure


def _figure5(model: str, largest: Mapping[str, Tensor], readers: Mapping[str, str]) -> Any:
    """Heat maps of max |X| by channel and block; a channel's outliers are a vertical line."""
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    figure, panels = pyplot.subplots(
        len(largest), 1, figsize=(11, 3.2 * len(largest)), squeeze=False, layout="constrained"
    )
    for axes, (space, values) in zip(panels[:, 0], largest.items(), strict=True):
        floor = max(float(values.max()) * 1e-3, 1e-30)  # a channel that never fired has no log
        image = axes.imshow(
            values.clamp(min=floor).tolist(), aspect="auto", norm=LogNorm(), interpolation="nearest"
        )
        axes.set(title=f"input of {readers[space]}", xlabel="channel", ylabel="block")
        figure.colorbar(image, ax=axes, label="largest |X|")
    figure.suptitle(f"{model}: largest absolute activation of each channel")
    return figure


def _figure7(
    model: str,
    tables: Sequence[Table],
    records: Mapping[str, Record],
    names: Mapping[str, str],
) -> Any | None:
    """Clip ratio of o and down by block, of the row that is most of the method."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    clipped = _clipped_row(tables, records)
    if clipped is None:
        return None
    row, options = clipped
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, ratios in records[row.key].clips.items():
        axes.plot(range(len(ratios)), ratios, marker="o", markersize=4, label=names[name])
    rotation = {"none": "no"}.get(options.rotation, options.rotation)
    axes.set(title=f"{model}: clip ratios, {rotation} rotation", xlabel="block", ylabel="ratio")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 1.05)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _clipped_row(
    tables: Sequence[Table], records: Mapping[str, Record]
) -> tuple[Row, Options] | None:
    """A finished row with searched ratios of o and down, the most of the method first."""

    def lacks(clipped: tuple[Row, Options]) -> tuple[bool, bool, int]:
        _, options = clipped
        return options.rotation != "none", options.weights != "gptq", -options.compensation_rank

    clipped = [
        (row, row.options)
        for table in tables
        for row in table.rows
        if row.key in records
        and row.options is not None
        and row.options.activations != "dynamic"
        and row.options.clipping == "adaptive"
    ]
    return min(clipped, key=lacks, default=None)

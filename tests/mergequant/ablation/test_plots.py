"""Figures: a file for each for which there is something to draw, and the right rows in it."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mergequant import InputError, Options
from mergequant.ablation import plots
from mergequant.ablation.measure import Measured
from mergequant.ablation.records import Record
from mergequant.ablation.rows import Row
from mergequant.ablation.survey import Survey
from mergequant.ablation.tables import distinct, tables
from mergequant.model.architectures import find

pytest.importorskip("matplotlib", reason="matplotlib is not installed: the extra `plots` brings it")

WIDTHS = {"hidden": 64, "queries": 64, "intermediate": 172}
LLAMA = find("llama")
NAMES = {x.name: x.short for x in LLAMA.linears}
TABLES = list(tables(Options(compensation_rank=2), WIDTHS).values())
SURVEY = Survey(
    largest={"attn_in": torch.rand(2, 64), "mlp_in": torch.zeros(2, 64)},
    space="mlp_in",
    block=1,
    before=torch.rand(64),
    after=torch.rand(70),
)


def record(row: Row, number: int, **accuracies: float) -> Record:
    return Record(
        key=row.key,
        options=None,
        measured={"vllm": {"wiki": Measured(loss=1.0 + number, tokens=1, windows=1)}},
        accuracies=accuracies,
        growth=0.0,
        seconds={"quantize": 1.0},
        clips={"self_attn.o_proj": [0.8, 0.7], "mlp.down_proj": [0.6, number / 100]},
        device="CPU",
    )


RECORDS = {row.key: record(row, i, own=5.0) for i, row in enumerate(distinct(TABLES))}


def test_every_figure_is_drawn(tmp_path: Path) -> None:
    drawn = plots.draw(tmp_path, "tiny", TABLES, RECORDS, SURVEY, LLAMA)
    assert [path.name for path in drawn] == [
        "figure-1-calibrations.png",
        "figure-2c-reconstruction.png",
        "figure-5-6-channels.png",
        "figure-7-clips.png",
    ]
    for path in drawn:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


def test_what_has_no_row_is_left_out(tmp_path: Path) -> None:
    drawn = plots.draw(tmp_path, "tiny", TABLES, {}, SURVEY, LLAMA)
    assert [path.name[:9] for path in drawn] == ["figure-2c", "figure-5-"]


def test_figures_name_the_linears_of_the_architecture() -> None:
    phi3 = {x.space: x.title for x in find("phi3").readers()}
    figure: Any = plots._figure5("tiny", SURVEY.largest, phi3)
    titles = [axes.get_title() for axes in figure.axes[:2]]
    assert titles == ["input of qkv", "input of gate_up"]


def test_a_model_whose_linears_read_no_norm_has_no_figure_of_them(tmp_path: Path) -> None:
    drawn = plots.draw(tmp_path, "tiny", TABLES, RECORDS, None, find("olmo2"))
    assert [path.name[:9] for path in drawn] == ["figure-1-", "figure-7-"]


def bars(records: dict[str, Record]) -> tuple[str, list[float]]:
    figure: Any = plots._figure1("tiny", TABLES, records)
    axes = figure.axes[0]
    return axes.get_ylabel(), [bar.get_height() for bar in axes.patches]


def test_figure_1_shows_tasks_if_there_are_any_and_piqa_if_it_is_among_them() -> None:
    rows = next(table for table in TABLES if table.name == "figure1").rows
    losses = {row.key: record(row, i) for i, row in enumerate(rows)}
    own = {row.key: record(row, i, own=10.0 + i, also=20.0 + i) for i, row in enumerate(rows)}
    piqa = {row.key: record(row, i, own=10.0, piqa=50.0 + i) for i, row in enumerate(rows)}
    assert bars(losses) == ("loss, mean of texts, nats a token", [2.0, 4.0, 6.0, 3.0, 5.0, 7.0])
    assert bars(own)[1] == [16.0, 18.0, 20.0, 17.0, 19.0, 21.0]
    assert bars(piqa) == ("accuracy on PIQA, %", [51.0, 53.0, 55.0, 52.0, 54.0, 56.0])


def test_figure_7_is_of_the_method_without_rotation() -> None:
    figure: Any = plots._figure7("tiny", TABLES, RECORDS, NAMES)
    row = next(row for row in distinct(TABLES) if row.label == "MergeQuant, no rotation")
    drawn = [list(line.get_ydata()) for line in figure.axes[0].get_lines()]
    assert drawn == list(RECORDS[row.key].clips.values())
    assert [x.get_text() for x in figure.axes[0].get_legend().get_texts()] == ["o", "down"]


def test_without_matplotlib_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r'pip install "mergequant-vllm\[plots\]"'):
        plots.require_matplotlib()

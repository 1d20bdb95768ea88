"""The page about a run: whole, by itself, with a figure for each thing that there is."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mergequant import InputError, cli
from mergequant.evaluate import report_figures as figures
from mergequant.evaluate.compare import Figure, record
from mergequant.evaluate.report import read_report, write_report


class Page(HTMLParser):
    """Counts elements, keeps headings, and fails on an end without its beginning."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [x or "" for name, x in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    pytest.importorskip("matplotlib")
    return Path(shutil.copytree(checkpoint, tmp_path / "a <b> & c"))


def test_the_page_is_whole_and_needs_nothing_beside_it(folder: Path) -> None:
    text = write_report(folder).read_text()
    page = Page(text)
    wanted = ["Loss of each linear", "Bits", "Clip ratios", "Time", "Options and versions"]
    assert [x for x in page.headings if x != "Training of each block"] == wanted
    assert page.tags.count("svg") == page.tags.count("h2") - 1
    assert "script" not in page.tags and "img" not in page.tags
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "a &lt;b&gt; &amp; c" in text


def test_what_was_measured_and_trained_is_shown(folder: Path) -> None:
    record(folder, [Figure("text", 20.0, 25.0, loss_added=0.2)])
    lines = read_report(folder)
    lines[0]["compensation"] = {"loss_before": 0.2, "loss_after": 0.1, "epochs": 1, "kept": True}
    file = folder / "quantization_report.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    text = write_report(folder).read_text()
    assert {"Evaluation", "Training of each block"} <= set(Page(text).headings)
    assert "<td>text</td><td>20.00</td><td>25.00</td><td>80.00</td>" in text
    assert write_report(folder).read_text() == text  # the same page again


def test_the_figures_have_the_reports_numbers(folder: Path) -> None:
    lines = read_report(folder)
    kinds = figures.by_kind(lines)
    assert list(kinds)[:3] == ["q_proj", "k_proj", "v_proj"]
    assert [figures.block_of(x["linear"]) for x in kinds["down_proj"]] == [0, 1]
    drawn = figures.losses(lines)
    assert drawn is not None and drawn.count("q_proj") == 1 and "GPTQ, held-out tokens" in drawn
    assert figures.training([]) is None is figures.losses([]) is figures.bits({"lm_head": (8, 8)})


def test_clip_ratios_of_either_kind_are_drawn_in_any_order() -> None:
    ends = {"lowest": 0.2, "mean": 0.5, "highest": 0.9}
    lines = [
        {"linear": f"model.layers.{block}.mlp.up_proj", "clip": clip}
        for block, clip in enumerate((0.7, ends, None))
    ]
    assert figures.clips(lines) and figures.clips(lines[1:] + lines[:1])


def test_the_command_says_where_the_page_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "own.html"
    cli.app(["report", str(folder), "--page", str(page)], standalone_mode=False)
    assert capsys.readouterr().out.strip() == str(page) and page.is_file()
    assert not (folder / "report.html").exists()


def test_a_checkpoint_without_its_report_is_refused(folder: Path, llama: Path) -> None:
    with pytest.raises(InputError, match="not a mergequant checkpoint"):
        write_report(llama)
    (folder / "quantization_report.jsonl").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        write_report(folder)
    (folder / "quantization_report.jsonl").unlink()
    with pytest.raises(InputError, match="has no quantization_report"):
        write_report(folder)

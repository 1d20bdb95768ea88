"""The page about a run: whole, by itself, with a figure for each thing that there is."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mergequant import InputError, cli
from mergequant.evaluate.compare import Figure, record
from mergequant.evaluate.report import read_report, write_report
from mergequant.output import run_figures as figures

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


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
    wanted = ["Loss of each linear", "Bits", "Clip ratios", "Outlier channels", "Time", "Memory"]
    wanted.append("Options and versions")
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
    drawn = figures.svg(figures.losses(lines))
    assert drawn.count("q_proj") == 1 and "GPTQ, held-out tokens" in drawn
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


def test_outliers_are_shown_before_and_after(folder: Path) -> None:
    lines = read_report(folder)
    kinds = figures.by_kind(lines)
    for line in (*kinds["q_proj"], *kinds["gate_proj"]):
        assert min(line["outliers"].values()) >= 1.0
    assert not any("outliers" in line for line in kinds["down_proj"])
    drawn = figures.svg(figures.outliers(lines))
    assert "q_proj" in drawn and "gate_proj" in drawn and "k_proj" not in drawn  # q's and k's: one
    assert figures.outliers(kinds["down_proj"]) is None is figures.memory(lines[1:2])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH")
def test_a_browser_shows_the_page(folder: Path, tmp_path: Path) -> None:
    """It opens without an error, and where the figures are there is something to see."""
    page = write_report(folder, tmp_path / "page.html")
    shot = tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,3000"]

    def browse(*own: str) -> str:
        command = [str(BROWSER), *flags, *own, page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert ":CONSOLE" not in done.stderr
        return done.stdout

    seen = Page(browse("--dump-dom"))
    assert seen.tags.count("svg") == Page(page.read_text()).tags.count("svg") > 4
    browse(f"--screenshot={shot}")
    from matplotlib.image import imread

    rows = (imread(shot)[..., :3] < 0.9).any(axis=-1).any(axis=-1)  # with anything in them
    assert rows.mean() > 0.5

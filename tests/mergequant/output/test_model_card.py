"""The model card: the hub's front matter, what was quantized, and a command that makes it again."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergequant import Options
from mergequant.cli_flags import read_options, spelled
from mergequant.evaluate.checkpoint_contents import sizes
from mergequant.evaluate.report import read_report
from mergequant.model.reader import Reader
from mergequant.output.model_card import CalibrationLoss, base_name, model_card
from mergequant.output.run_figures import draw_for_card
from mergequant_vllm.format import parse


def card_of(checkpoint: Path, source: Path, *more: Any) -> str:
    return model_card(source, parse(Reader(checkpoint).config["quantization_config"]), *more)


def front(card: str) -> dict[str, object]:
    loaded: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return loaded


def test_the_front_matter_is_the_hubs(checkpoint: Path, tmp_path: Path) -> None:
    assert front(card_of(checkpoint, tmp_path)) == {
        "base_model": tmp_path.name,
        "library_name": "vllm",
        "quantized_by": "mergequant",
        "tags": ["mergequant", "vllm", "w4a4"],
    }
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own\nlanguage: en\n---\n# Model\nlicense: no\n"
    )
    matter = front(card_of(checkpoint, tmp_path))
    assert (matter["license"], matter["license_name"]) == ("other", "own")
    assert "language" not in matter


def test_the_checkpoint_has_its_card(checkpoint: Path, llama: Path) -> None:
    card = (checkpoint / "README.md").read_text()
    told = re.search(
        r"loss is (.*) nats a token \(the head in 16 bits\), (.*) (above|below) the source", card
    )
    assert told is not None
    after, more = float(told[1]), float(told[2]) * (1 if told[3] == "above" else -1)
    figures = dict(re.findall(r"!\[(.*)\]\((.*)\)", card))
    assert card == card_of(checkpoint, llama, CalibrationLoss(after - more, after), figures)


def test_its_figures_lie_beside_it(checkpoint: Path) -> None:
    pytest.importorskip("matplotlib")
    files = re.findall(r"!\[.*\]\((.*)\)", (checkpoint / "README.md").read_text())
    assert files == [f"figures/{name}.png" for name in ("loss", "clip-ratios", "outliers")]
    for file in files:
        assert (checkpoint / file).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_are_none(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw_for_card(read_report(checkpoint), tmp_path) == {}
    assert not list(tmp_path.iterdir())


def test_it_says_what_was_quantized_and_what_was_not(checkpoint: Path, llama: Path) -> None:
    card = card_of(checkpoint, llama)
    assert "| q_proj (2), k_proj (2), v_proj (2), gate_proj (2), up_proj (2) | 4 bits |" in card
    assert "| o_proj (2), down_proj (2) | 4 bits | 4 bits, dynamic |" in card
    assert "| lm_head (1) | 8 bits | 8 bits, dynamic |" in card
    assert "Not quantized: norms, embedding." in card


def test_its_command_asks_for_the_same_options(checkpoint: Path, llama: Path) -> None:
    card = card_of(checkpoint, llama)
    (line,) = [x for x in card.splitlines() if x.startswith("mergequant quantize")]
    made = parse(Reader(checkpoint).config["quantization_config"]).provenance
    assert shlex.split(line)[-len(spelled(made.options)) :] == spelled(made.options)
    assert made.calibration_sha256 in card and made.versions["torch"] in card


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"weight_bits": 8, "static_bits": 8, "dynamic_bits": 8},
        {"equalization": False, "asymmetric": True, "group_size": 64},
        {"alpha": 2.0, "reconstruction": "pad", "average_bits": 5.0},
        {"ignore": ["a", "re:b.*"]},
        {"overrides": {"re:.*down_proj": {"weight_bits": 8, "weight_search": "minmax"}}},
    ],
)
def test_options_are_spelled_as_the_command_line_reads_them(changed: dict[str, object]) -> None:
    options = Options.model_validate(changed)
    flags: dict[str, object] = {}
    words = spelled(options.model_dump(mode="json"))
    while words:
        name = words.pop(0).removeprefix("--").replace("-", "_")
        if name == "override":
            flags.setdefault("overrides", []).append(words.pop(0))  # type: ignore[attr-defined]
        elif name == "ignore":
            flags.setdefault(name, []).append(words.pop(0))  # type: ignore[attr-defined]
        elif words and not words[0].startswith("--"):
            flags[name] = int(words[0]) if words[0].isdigit() else words[0]
            words.pop(0)
        else:
            flags[name.removeprefix("no_")] = not name.startswith("no_")
    assert read_options(flags) == options


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/cache/hub/models--org--name-7B/snapshots/0123abcd", "org/name-7B"),
        ("/models/name-7B", "name-7B"),
    ],
)
def test_a_model_has_the_hubs_name_or_its_folders(folder: str, name: str) -> None:
    assert base_name(Path(folder)) == name


def test_sizes_are_those_of_the_files_beside_the_sources(checkpoint: Path, llama: Path) -> None:
    total, source = (
        sum(x.stat().st_size for x in folder.glob("*.safetensors")) / 1e6
        for folder in (checkpoint, llama)
    )
    said = f"{total:.1f} MB, {total / source:.2f} of the source's {source:.1f} MB"
    assert sizes(checkpoint, llama) == said

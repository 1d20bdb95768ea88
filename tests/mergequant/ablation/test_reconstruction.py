"""Reconstruction is decided once a rotation, for the whole method, and kept."""

import gc
from pathlib import Path
from typing import Any

import pytest

from mergequant import Options
from mergequant.ablation import ablate, reconstruction
from mergequant.ablation.reconstruction import kept_shapes
from mergequant.ablation.rows import RowMaker, Shapes
from mergequant.ablation.tables import tables
from mergequant.quantizer.choose_reconstruction import Decision
from tests.tiny import make_model

WIDTHS = {"hidden": 64, "queries": 64, "intermediate": 172}
BASE = Options(
    reconstruction="auto",
    alpha="auto",
    compensation_rank=2,
    statistics_samples=2,
    gptq_samples=2,
    compensation_samples=2,
    sequence_length=32,
    max_extra_channels=0.25,
    device="cpu",
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """What was to be decided; offline, nothing measures best."""
    decided: list[Options] = []

    def decide(*arguments: Any) -> Decision:
        options: Options = arguments[2]
        decided.append(options)
        mode = "none" if options.rotation == "offline" else "prune"
        return Decision.model_validate(
            {
                "rotation": options.rotation,
                "reconstruction": mode,
                "alpha": float(len(decided)),
                "max_extra_channels": 0.25,
            }
        )

    monkeypatch.setattr(reconstruction, "resolve_reconstruction", decide)
    return decided


def shapes(model: Path, text: Path, file: Path, base: Options, *names: str) -> Shapes:
    chosen = [table for name, table in tables(base, WIDTHS).items() if name in names]
    return kept_shapes(file, model, [text], base, chosen, progress=False)


def test_each_rotation_is_decided_once_and_kept(
    llama: Path, text: Path, tmp_path: Path, asked: list[Options]
) -> None:
    file = tmp_path / "reconstruction.json"
    first = shapes(llama, text, file, BASE, "table4")
    make = RowMaker(BASE, {})
    assert asked == [make.whole_options("online"), make.whole_options("none")]
    room = {"max_extra_channels": 0.25}
    assert first == {
        "online": {"reconstruction": "prune", "alpha": 1.0, **room},
        "none": {"reconstruction": "prune", "alpha": 2.0, **room},
    }
    more = shapes(llama, text, file, BASE, "table4", "table1", "table5")
    assert more == {**first, "offline": {"reconstruction": "none"}}
    assert len(asked) == 3
    shapes(llama, text, file, BASE.model_copy(update={"seed": 1}), "table5")
    assert len(asked) == 4


def test_nothing_is_decided_where_nothing_is_asked(
    llama: Path, text: Path, tmp_path: Path, asked: list[Options]
) -> None:
    file = tmp_path / "reconstruction.json"
    given = BASE.model_copy(update={"reconstruction": "prune", "alpha": 5.0})
    assert shapes(llama, text, file, given, "table4") == {}
    assert shapes(llama, text, file, BASE, "table7") == {}
    assert not asked and not file.exists()


def test_the_command_with_the_real_quantizer(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "collect", lambda: 0)  # of all that tests have imported
    done = ablate(
        make_model(tmp_path / "model", blocks=1),
        tmp_path / "out",
        [text],
        [text],
        paper=["table1"],
        engine="transformers",
        window=32,
        most_windows=2,
        base=BASE.model_copy(update={"compensation_epochs": 1}),
        progress=False,
    )
    assert not done.failed and "not run" not in done.markdown
    assert "Reconstruction that measured best: " in done.markdown

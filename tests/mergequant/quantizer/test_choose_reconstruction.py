"""The choice of a reconstruction: by measured error, and K no longer than it needs."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mergequant import InputError, Options, quantize
from mergequant.model.decoder import Decoder
from mergequant.model.reader import Reader
from mergequant.model.shapes import paper_alpha
from mergequant.quantizer import choose_reconstruction as pilot
from mergequant.quantizer.choose_reconstruction import (
    Candidate,
    Decision,
    resolve_reconstruction,
)
from mergequant.quantizer.pilot_walk import walk_plain_model
from mergequant.quantizer.prepare import calibration_of, find_device, open_model
from mergequant_vllm.format import parse
from tests.conftest import SMALL
from tests.tiny import make_model

WIDE = {"reconstruction": "auto", "max_extra_channels": 0.5, "split_by": "folded"}


def _resolve(model: Path, text: Path, **changes: Any) -> Decision:
    options = Options.model_validate({**SMALL.model_dump(), **WIDE, **changes})
    reader, architecture, _ = open_model(model, options)
    windows = calibration_of(reader, [text], options)
    device = find_device("cpu")
    inputs = walk_plain_model(model, windows, options, device, progress=False).inputs
    decoder = Decoder(reader, architecture, device)
    return resolve_reconstruction(decoder, inputs, options, progress=False)


def _pretend(monkeypatch: pytest.MonkeyPatch, errors: dict[str, float], columns: int) -> None:
    """Have each mode measure as told, and each padding need so many columns."""

    def error(_: Any, candidate: Candidate) -> float:
        if candidate.options.reconstruction == "pad":
            candidate.columns = columns
        return errors[candidate.options.reconstruction]

    monkeypatch.setattr(pilot, "_error", error)


@pytest.mark.parametrize(
    ("errors", "chosen"),
    [
        ({"none": 1.0, "prune": 1.1, "pad": 0.9}, "none"),  # 0.9 * 80/64 > 1
        ({"none": 1.0, "prune": 1.1, "pad": 0.7}, "pad"),
        ({"none": 1.0, "prune": 0.8, "pad": 0.7}, "prune"),
        ({"none": 9e-4, "prune": 8e-4, "pad": 1e-9}, "none"),  # no columns for next to nothing
        ({"none": 2e-3, "prune": 3e-3, "pad": 1e-9}, "pad"),
    ],
)
def test_a_longer_k_must_lower_the_error_by_more_than_it_costs(
    monkeypatch: pytest.MonkeyPatch,
    llama: Path,
    text: Path,
    errors: dict[str, float],
    chosen: str,
) -> None:
    _pretend(monkeypatch, errors, columns=70)
    decision = _resolve(llama, text)
    assert decision.reconstruction == chosen
    if chosen == "pad":
        assert decision.max_extra_channels == 80 / 64 - 1  # 70 columns in tiles of 16


def test_padding_that_nobody_needs_is_not_paid_for(
    monkeypatch: pytest.MonkeyPatch, llama: Path, text: Path
) -> None:
    _pretend(monkeypatch, {"pad": 1.0}, columns=64)
    assert _resolve(llama, text, reconstruction="pad").reconstruction == "none"


def _noting(error: Callable[..., float], errors: list[float]) -> Callable[..., float]:
    def noting(*arguments: Any) -> float:
        errors.append(error(*arguments))
        return errors[-1]

    return noting


def test_the_error_is_that_of_the_layers_output(llama: Path, text: Path) -> None:
    """With 8-bit codes on both sides next to nothing is lost; with 3-bit weights much is."""
    lost = {}
    for bits, activations in ((8, 8), (4, 4), (3, 4)):
        errors: list[float] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pilot, "_error", _noting(pilot._error, errors))
            _resolve(llama, text, reconstruction="pad", weight_bits=bits, static_bits=activations)
        lost[bits] = sum(errors) / len(errors)
    # Uniform rounding loses at least step^2 / 12 of a range of +-127 and +-7 steps.
    assert lost[8] < lost[4] / 50 and lost[4] < lost[3] / 2


def test_the_papers_thresholds_are_told_apart_by_the_vocabulary(llama: Path) -> None:
    config = Reader(llama).config
    assert paper_alpha({**config, "vocab_size": 32_000}) == 5.0
    assert paper_alpha({**config, "vocab_size": 128_256}) == 2.0


def test_what_was_decided_is_stored_and_logged(
    tmp_path: Path, llama: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = Options.model_validate({**SMALL.model_dump(), **WIDE, "staggered": True})
    with caplog.at_level(logging.INFO, "mergequant"):
        folder = quantize(llama, tmp_path / "out", [text], options, progress=False)
    stored = parse(Reader(folder).config["quantization_config"]).provenance.options
    assert stored["reconstruction"] in ("none", "prune", "pad")
    assert isinstance(stored["alpha"], float)
    assert "Reconstruction pad, alpha 0: error" in caplog.text


def test_too_many_copies_to_prune_for_is_said(tmp_path: Path, text: Path) -> None:
    model = make_model(tmp_path / "model")
    options = SMALL.model_copy(update={"reconstruction": "prune", "alpha": 0.0})
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mergequant.quantizer.inputs.static.reconstruct",
            lambda *_, **__: (_ for _ in ()).throw(ValueError("9 copies need as many channels")),
        )
        with pytest.raises(InputError, match="--reconstruction prune --alpha 0: 9 copies"):
            quantize(model, tmp_path / "out", [text], options, progress=False)
    assert not (tmp_path / "out").exists()


def test_what_was_given_up_is_not_chosen_for_its_few_easy_blocks(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mean is over fewer norms than the others'."""

    def error(_: Any, candidate: Candidate) -> float:
        if len(candidate.errors) >= 2:  # two norms a block: the second block is hard
            return 10.0
        return {"none": 0.1, "prune": 0.3, "pad": 0.3}[candidate.options.reconstruction]

    monkeypatch.setattr(pilot, "_error", error)
    assert _resolve(llama, text).reconstruction == "none"

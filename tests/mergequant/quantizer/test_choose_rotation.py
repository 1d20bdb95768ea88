"""Which rotation is chosen: by measured error, among what the architecture allows."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from mergequant import Options, quantize
from mergequant.errors import InputError
from mergequant.model.architecture import Norm
from mergequant.model.architectures import find
from mergequant.model.architectures.llama import LLAMA
from mergequant.model.reader import Reader
from mergequant.quantizer import choose_rotation
from mergequant.quantizer.choose_rotation import resolve_rotation
from mergequant.quantizer.decision import possible_rotations
from mergequant.quantizer.pilot_walk import PilotWalk, walk_plain_model
from mergequant.quantizer.prepare import calibration_of
from mergequant_vllm.format import parse
from tests.conftest import SMALL
from tests.tiny import make_model

AUTO = SMALL.model_copy(update={"rotation": "auto"})
CPU = torch.device("cpu")


def possible(source: Path, options: Options = AUTO) -> tuple[str, ...]:
    return possible_rotations(find("llama"), Reader(source).config, options)


def test_the_rotation_of_least_error_is_chosen(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {"online": 0.5, "none": 0.4}
    monkeypatch.setattr(choose_rotation, "_errors", lambda *_: errors)
    assert resolve_rotation(llama, PilotWalk(), AUTO, CPU, False) == "none"
    errors["none"] = 0.6
    assert resolve_rotation(llama, PilotWalk(), AUTO, CPU, False) == "online"


def test_the_error_is_that_of_the_quantized_blocks(llama: Path, text: Path) -> None:
    windows = calibration_of(Reader(llama), [text], AUTO)
    inputs = walk_plain_model(llama, windows, AUTO, CPU, False).inputs
    assert inputs

    def error(**changes: object) -> float:
        options = SMALL.model_copy(update={"alpha": 0.0, **changes})
        return choose_rotation._errors(
            llama, PilotWalk(inputs=inputs), {options.decided_rotation: options}, CPU, False
        )[options.decided_rotation]

    eight = error(weight_bits=8, static_bits=8, dynamic_bits=8)
    # 16 times finer steps leave 256 times less, if nothing else is lost.
    assert 0 < eight < error() / 64
    # A random model has no outliers, which a rotation could spread.
    assert error(rotation="online") == pytest.approx(error(), rel=0.5)


def test_what_was_chosen_is_what_the_checkpoint_says(
    tmp_path: Path, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose_rotation, "_errors", lambda *_: {"online": 0.0, "none": 1.0})
    folder = quantize(llama, tmp_path / "out", [text], AUTO, progress=False)
    chosen = parse(json.loads((folder / "config.json").read_text())["quantization_config"])
    assert chosen.provenance.options["rotation"] == "online"
    down = chosen.quantized["model.layers.0.mlp.down_proj"].dynamic
    assert down is not None and down.hadamard is not None


def test_nothing_is_measured_where_there_is_no_choice(tmp_path: Path, llama: Path) -> None:
    assert possible(llama) == ("online", "none")
    assert possible(llama, SMALL.model_copy(update={"rotation": "offline"})) == ("offline",)
    odd = make_model(tmp_path / "odd", "llama", intermediate=65)
    assert possible(odd) == ("offline", "none")
    with pytest.raises(InputError, match="--mix-heads 3 does not divide"):
        possible(llama, AUTO.model_copy(update={"mix_heads": 3}))
    sandwich = dataclasses.replace(LLAMA, norms=(*LLAMA.norms, Norm("after", "mixed", "residual")))
    # The residual stays; values, and what down reads, can be rotated.
    assert possible_rotations(sandwich, Reader(llama).config, AUTO) == ("online", "none")
    carried = AUTO.model_copy(update={"activations": "fully_static"})
    assert possible_rotations(sandwich, Reader(llama).config, carried) == ("none",)
    assert possible(llama, carried) == ("offline", "none")


def test_a_hopeless_rotation_is_not_tried_to_the_end(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[str, int]] = []

    def error(candidate: choose_rotation._Candidate, number: int, *_: object) -> float:
        rotation = "online" if candidate.decoder.reader.online else "none"
        tried.append((rotation, number))
        return {"online": 1.0, "none": 2.5 if number == 0 else 0.1}[rotation]

    monkeypatch.setattr(choose_rotation._Candidate, "error", error)
    inputs = {number: [torch.zeros(1, 4, 64)] for number in (0, 1)}
    assert resolve_rotation(llama, PilotWalk(inputs=inputs), AUTO, CPU, False) == "online"
    assert sorted(tried) == [("none", 0), ("online", 0), ("online", 1)]

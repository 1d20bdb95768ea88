"""The head in 8 bits: what is stored, that it computes what it says, that ties are cut."""

import json
from pathlib import Path

import pytest
import torch

from mergequant import quantize
from mergequant.errors import InputError
from mergequant.evaluate.reference_forward import load_model
from mergequant.layers.served_linear import from_stored
from mergequant.model.reader import Reader
from mergequant.model.rotated_reader import ROWS_AT_ONCE
from mergequant.quantizer.head import quantize_head
from mergequant.quantizer.in_memory import quantize_in_memory
from mergequant.quantizer.prepare import open_model
from mergequant_vllm.format import FormatError, parse
from mergequant_vllm.packing import unpack
from tests.conftest import SMALL
from tests.forms import linear_form
from tests.tiny import make_model

EIGHT = SMALL.model_copy(update={"head_bits": 8})


def test_codes_are_the_nearest_and_outputs_within_half_a_step() -> None:
    torch.manual_seed(0)
    weight, x = (
        torch.randn(ROWS_AT_ONCE + 5, 96) * torch.rand(ROWS_AT_ONCE + 5, 1),
        torch.randn(7, 96),
    )
    stored = quantize_head(weight)
    step = stored["weight_scale"].to(torch.float64)
    codes = unpack(stored["weight_packed"], 8, 96).to(torch.float64)
    # The largest code may be cut where the step was rounded down to 16 bits: by 2^-9 of 127 steps.
    assert bool(((codes * step - weight).abs() <= step * (0.5 + 127 * 2**-9)).all())
    y = from_stored(
        linear_form((len(weight), 96), "dynamic", weight_bits=8, activation_bits=8),
        stored.__getitem__,
        torch.float32,
    )(x)
    token_step = x.abs().amax(1, keepdim=True).to(torch.float64) / 127
    exact = x.to(torch.float64) @ (codes * step).T
    bound = 0.5 * token_step * (codes * step).abs().sum(1)
    assert bool(((y - exact).abs() <= bound * (1 + 1e-3)).all())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rotation", ["none", "offline"])
def test_only_the_head_changes(tmp_path: Path, text: Path, tied: bool, rotation: str) -> None:
    model = make_model(tmp_path / "model", tied=tied)
    eight = EIGHT.model_copy(update={"rotation": rotation})
    plain = eight.model_copy(update={"head_bits": 16})
    folder = quantize(model, tmp_path / "eight", [text], eight, progress=False)
    other = quantize(model, tmp_path / "plain", [text], plain, progress=False)
    eight_bit, expected = load_model(folder), load_model(other)
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert "lm_head.weight" not in Reader(folder).headers
    ids = torch.arange(40)[None]
    with torch.no_grad():
        hidden = expected.model(ids).last_hidden_state
        assert torch.equal(eight_bit.model(ids).last_hidden_state, hidden)
        logits, exact = eight_bit(ids).logits, expected(ids).logits
    assert torch.equal(eight_bit.lm_head(hidden), logits)
    error = (logits - exact).norm() / exact.norm()
    assert 0 < float(error) < 0.02  # of 8 bits; 4 bits would leave 0.1 and more


def test_in_memory_it_is_the_checkpoints(tmp_path: Path, text: Path, llama: Path) -> None:
    folder = quantize(llama, tmp_path / "eight", [text], EIGHT, progress=False)
    model, _ = quantize_in_memory(llama, [text], EIGHT, progress=False)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_model(folder)(ids).logits)


def test_a_head_that_is_not_dynamic_is_refused(tmp_path: Path, text: Path, llama: Path) -> None:
    folder = quantize(llama, tmp_path / "eight", [text], EIGHT, progress=False)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert list(parse(config).outer) == ["lm_head"]
    head = config["targets"][-1]
    assert head["pattern"] == "lm_head"
    head["linear"]["input"] = {"kind": "static"}
    with pytest.raises(FormatError, match=r"lm_head: nothing carries the steps of a static input"):
        parse(config)


def test_classes_that_are_read_from_the_head_keep_it_as_it_is(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "classifier_from_token": ["no"]}))
    with pytest.raises(InputError, match=r"classifier_from_token.*add --head-bits 16"):
        open_model(model, EIGHT)
    open_model(model, EIGHT.model_copy(update={"head_bits": 16}))

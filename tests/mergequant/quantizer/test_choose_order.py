"""Which channels of the residual are mixed: those of like variance, as norms hand them on."""

import json
from pathlib import Path

import pytest
import torch

from mergequant import Options, quantize
from mergequant.methods import rotate
from mergequant.model.reader import Reader
from mergequant.quantizer.choose_order import resolve_order, variance_shares
from mergequant.quantizer.decide import decide
from mergequant.quantizer.prepare import calibration_of, open_model
from tests.conftest import SMALL
from tests.tiny import make_model

CPU = torch.device("cpu")
ROTATED = SMALL.model_copy(update={"rotation": "offline"})


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotate, "_SMALLEST_GROUP", 16)  # 4 groups of 64 channels


def order_of(model: Path, text: Path, **changes: object) -> list[int] | None:
    options = ROTATED.model_copy(update=changes)
    windows = calibration_of(Reader(model), [text], options)
    return resolve_order(model, windows, options, CPU, False)


def test_shares_are_of_tokens_divided_by_their_size() -> None:
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)) + 3.0
    x *= torch.logspace(-1, 1, 8)
    lengths = torch.logspace(-3, 3, 400)[:, None]  # of tokens: a norm divides them out
    rows = [row / (sum(float(v) ** 2 for v in row) / 8) ** 0.5 for row in x]
    variance = torch.stack(rows).double().var(dim=0, unbiased=False)
    shares = variance_shares(list(torch.split((x * lengths)[None], 100, dim=1)))
    torch.testing.assert_close(shares, variance / variance.sum(), rtol=1e-5, atol=0)
    assert torch.equal(variance_shares([torch.zeros(1, 3, 8)]), torch.zeros(8).double())


def test_channels_come_by_falling_variance(tmp_path: Path, text: Path) -> None:
    model = make_model(tmp_path / "model", "llama", blocks=1)
    large = [5, 40, 17]
    reader = Reader(model)
    from safetensors.torch import load_file, save_file

    (file,) = reader.weight_files()
    tensors = load_file(file)
    for place, channel in enumerate(large):
        tensors["model.embed_tokens.weight"][:, channel] *= 1000.0 / 10**place
    save_file(tensors, file, {"format": "pt"})
    order = order_of(model, text)
    assert order is not None and sorted(order) == list(range(64)) and order[:3] == large


@pytest.mark.parametrize(
    "changes", [{"rotation": "none"}, {"residual_rotation": "full"}, {"activations": "dynamic"}]
)
def test_there_is_no_order_where_nothing_is_graded(
    llama: Path, text: Path, changes: dict[str, object]
) -> None:
    assert order_of(llama, text) is not None
    assert order_of(llama, text, **changes) is None


def test_a_model_of_one_group_has_no_order(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotate, "_SMALLEST_GROUP", 64)
    assert order_of(llama, text) is None


def test_what_is_decided_is_what_the_checkpoint_is_rotated_by(
    tmp_path: Path, llama: Path, text: Path
) -> None:
    folder = quantize(llama, tmp_path / "out", [text], ROTATED, progress=False)
    windows = calibration_of(Reader(llama), [text], ROTATED)
    decision = decide(llama, windows, ROTATED, CPU, False)
    assert decision.order is not None
    name = "model.embed_tokens.weight"
    graded, _, _ = open_model(llama, ROTATED, decision.order)
    full, _, _ = open_model(llama, ROTATED)
    stored = Reader(folder).read(name)
    assert torch.equal(stored, graded.read_in_source_dtype(name))
    assert not torch.equal(stored, full.read_in_source_dtype(name))
    options = json.loads((folder / "config.json").read_text())["quantization_config"]
    told = Options.model_validate(options["provenance"]["options"])
    assert told.residual_rotation == "graded"

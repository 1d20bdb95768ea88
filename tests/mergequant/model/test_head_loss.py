"""The loss at the head, some rows at a time, against all of them at once."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from mergequant import quantize
from mergequant.evaluate.reference_forward import load_model
from mergequant.model import head_loss
from mergequant.model.architectures import ARCHITECTURES
from mergequant.model.decoder import Decoder
from mergequant.model.head_loss import Head, next_token_losses
from mergequant.model.reader import Reader
from mergequant.quantizer.pilot_walk import pilot_windows, walk_plain_model
from mergequant.quantizer.prepare import calibration_of
from tests.conftest import SMALL
from tests.tiny import make_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [7, 258, 1000])
def test_rows_at_a_time_are_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "_ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 16, generator=generator)
    table = 10 * torch.randn(258, 16, generator=generator)  # logits far apart
    ids = torch.randint(258, (9,), generator=generator)
    expected = F.cross_entropy(x[:-1].double() @ table.double().T, ids[1:], reduction="none")
    found = next_token_losses(x, Head(table), ids)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize("tied", [False, True])
def test_a_walk_ends_with_the_models_own_loss(
    tmp_path: Path, text: Path, tied: bool, model_type: str
) -> None:
    folder = make_model(tmp_path / "model", model_type, tied=tied)
    windows = calibration_of(Reader(folder), [text], SMALL)
    used = pilot_windows(windows, SMALL)
    model = load_model(folder)  # with the attention that computes all of the model
    with torch.no_grad():
        expected = float(model(used, labels=used).loss)
    options = SMALL.model_copy(update={"equalization": True})
    found = walk_plain_model(folder, windows, options, CPU, False).loss
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_run_measures_what_it_made(
    tmp_path: Path, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the last block are the states of the checkpoint in the reference arithmetic."""
    measured: list[tuple[float, torch.Tensor]] = []
    loss = Decoder.loss

    def keep(self: Decoder, batches: list[torch.Tensor], ids: torch.Tensor) -> float:
        measured.append((loss(self, batches, ids), ids))
        return measured[-1][0]

    monkeypatch.setattr(Decoder, "loss", keep)
    output = quantize(llama, tmp_path / "out", [text], SMALL, progress=False)
    found, ids = measured[-1]
    model = run_reference(output)
    with torch.no_grad():
        assert found == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-4)
    assert f"the loss is {found:.3f} nats a token" in (output / "README.md").read_text()


def run_reference(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model

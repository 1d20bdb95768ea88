"""Training of a block: it lowers the held-out loss, or leaves the codes as they were."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergequant import Options, quantize
from mergequant.quantizer import train_compensation as room
from mergequant.quantizer.train_compensation import RelativeError, _split
from tests.conftest import SMALL


@pytest.fixture(autouse=True, scope="module")
def _short_steps() -> Iterator[None]:
    """A window a step: there are few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "TOKENS_A_STEP", 64)
        yield


TRAINED = SMALL.model_copy(
    update={
        "compensation_rank": 8,
        "compensation_epochs": 3,
        "compensation_samples": 48,
    }
)


def _compensations(folder: Path) -> list[dict[str, Any]]:
    """What the report says of each block's training."""
    lines = (folder / "quantization_report.jsonl").read_text().splitlines()
    report = [json.loads(line) for line in lines]
    return [line["compensation"] for line in report if "compensation" in line]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    return quantize(
        llama, tmp_path_factory.mktemp("trained") / "out", [text], TRAINED, progress=False
    )


def test_held_out_loss_falls_and_other_codes_are_stored(trained: Path, checkpoint: Path) -> None:
    blocks = _compensations(trained)
    assert len(blocks) == 2
    for block in blocks:
        assert block["kept"] and block["loss_after"] < block["loss_before"]
        assert 1 <= block["epochs"] <= 3
    ours, plain = (
        load_file(trained / "model-00001-of-00003.safetensors"),
        load_file(checkpoint / "model-00001-of-00003.safetensors"),
    )
    for name, tensor in plain.items():
        differs = not torch.equal(ours[name], tensor)
        assert differs == name.endswith("weight_packed"), name  # steps stay GPTQ's


def test_training_that_helps_nothing_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama: Path, text: Path, checkpoint: Path
) -> None:
    monkeypatch.setattr(room, "_loss", lambda *_: 1.0)
    output = quantize(llama, tmp_path / "out", [text], TRAINED, progress=False)
    for name, tensor in load_file(checkpoint / "model-00002-of-00003.safetensors").items():
        assert torch.equal(load_file(output / "model-00002-of-00003.safetensors")[name], tensor)
    assert all(not block["kept"] for block in _compensations(output))


@pytest.mark.parametrize("rotation", ["offline", "online"])
def test_it_trains_through_rotation_reconstruction_and_groups(
    tmp_path: Path, llama: Path, text: Path, rotation: str
) -> None:
    options = Options.model_validate(
        {
            **TRAINED.model_dump(),
            "rotation": rotation,
            "reconstruction": "pad",
            "alpha": 0.0,
            "staggered": True,
            "max_extra_channels": 0.25,
            "weight_bits": 3,
            "group_size": 32,
            "asymmetric": True,
        }
    )
    output = quantize(llama, tmp_path / "out", [text], options, progress=False)
    blocks = _compensations(output)
    assert any(block["loss_after"] < block["loss_before"] for block in blocks)
    assert all(block["kept"] == (block["loss_after"] < block["loss_before"]) for block in blocks)


def test_held_out_windows_are_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    x = [torch.full((size, 600, 1), float(number)) for number, size in enumerate((16, 4))]
    y = [part + 10 for part in x]
    monkeypatch.setattr(room, "TOKENS_A_STEP", 1300)
    training, held_out = _split(x, y)
    assert sum(len(a) for a, _ in training) == 18 and sum(len(a) for a, _ in held_out) == 2
    assert {float(a.max()) for a, _ in held_out} == {1.0}
    for a, b in training + held_out:
        assert a.shape == b.shape and a.shape[0] * 600 <= room.TOKENS_A_STEP
        assert torch.equal(a + 10, b)
    one, two = _split(x[:1], y[:1])
    assert sum(len(a) for a, _ in one) == 14 and sum(len(a) for a, _ in two) == 2


def test_one_window_cannot_be_held_out(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(ValueError, match="compensation_samples"):
        Options(compensation_samples=1)
    short = tmp_path / "short.txt"
    short.write_text("The quick brown fox jumps over the lazy dog, again and again and again.")
    output = quantize(llama, tmp_path / "out", [short], TRAINED, progress=False)
    blocks = _compensations(output)
    assert len(blocks) == 2 and all(not x["kept"] and x["epochs"] == 0 for x in blocks)


class Emits:
    """Stands for a block: what it emits, whatever it reads."""

    def __init__(self, output: Tensor) -> None:
        self.output = output

    def forward(self, hidden: Tensor, *, gradient: bool = False) -> Tensor:
        return self.output


def test_each_token_counts_by_its_relative_error() -> None:
    """A massive token, a thousand times as long, weighs as much as any other."""
    generator = torch.Generator().manual_seed(0)
    x, y, emitted = (torch.randn(2, 5, 8, generator=generator) for _ in range(3))
    for tensor in (x, y, emitted):
        tensor[1, 3] *= 1000.0
    loss_of = RelativeError.over([x[:1], x[1:]], [y[:1], y[1:]])
    loss = loss_of(Emits(emitted), x, y)  # type: ignore[arg-type]
    relative = [
        [float((e - t).square().sum() / t.square().sum()) for e, t in zip(*rows, strict=True)]
        for rows in zip(emitted, y, strict=True)
    ]
    added = [
        float((t - a).square().sum() / t.square().sum())
        for a, t in zip(x.reshape(-1, 8), y.reshape(-1, 8), strict=True)
    ]
    torch.testing.assert_close(loss, torch.tensor(relative) / (sum(added) / 10))
    assert loss[1, 3] < 10 * loss.median()


def test_a_token_of_zeros_has_a_finite_loss() -> None:
    y = torch.ones(1, 4, 8)
    y[0, 2] = 0.0
    loss_of = RelativeError.over([torch.zeros_like(y)], [y])
    loss = loss_of(Emits(y + 1e-4), y, y)  # type: ignore[arg-type]
    assert torch.isfinite(loss).all()
    # Its square is a millionth of the mean one, 6 instead of 8.
    assert loss[0, 2] == pytest.approx(8 / 6 * 1e6 * float(loss[0, 0]), rel=1e-2)

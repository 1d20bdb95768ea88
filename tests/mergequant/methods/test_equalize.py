"""Equalized channels: the least product of the two sums, and a model that stays the same."""

from pathlib import Path

import pytest
import torch

from mergequant.errors import InputError
from mergequant.methods.equalize import channel_scales, relative_energy
from mergequant.model.architectures import ARCHITECTURES, find
from mergequant.model.equalized_reader import EqualizedReader, equalized, shared_channels
from mergequant.model.reader import Reader
from mergequant.model.rotated_reader import RotatedReader
from tests.mergequant.methods.test_rotate import logits, model_folder


def product(energy: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor) -> float:
    return float((energy / scale.square()).sum() * (columns * scale.square()).sum())


def test_scales_are_where_the_product_is_least() -> None:
    generator = torch.Generator().manual_seed(0)
    energy, columns = (torch.rand(40, generator=generator).double() ** 4 + 1e-3 for _ in range(2))
    scale = channel_scales(energy, columns)
    least = product(energy, columns, scale)
    assert least == pytest.approx(float((energy * columns).sqrt().sum().square()))
    for _ in range(100):
        other = scale * torch.exp(0.1 * torch.randn(40, generator=generator).double())
        assert product(energy, columns, other) > least
    # The input keeps its size.
    assert float((energy / scale.square()).sum()) == pytest.approx(float(energy.sum()))


def test_what_is_not_known_is_not_scaled() -> None:
    energy = torch.tensor([1.0, 0.0, 4.0, 1.0])
    columns = torch.tensor([1.0, 1.0, 0.0, 1e30])
    scale = channel_scales(energy, columns)
    assert scale[1] == scale[2] == 1 and scale[0] / scale[3] == pytest.approx(1024)
    assert (channel_scales(torch.zeros(3), torch.ones(3)) == 1).all()


def test_a_token_counts_by_its_shares() -> None:
    x = torch.tensor([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0]])
    torch.testing.assert_close(relative_energy(x), 2 * torch.tensor([9.0, 16.0]).double() / 25)


@pytest.mark.parametrize("rotation", [None, "offline", "online"])
@pytest.mark.parametrize("case", [*sorted(ARCHITECTURES), "llama-24", "qwen2-24"])
def test_equalized_models_are_the_same_models(tmp_path: Path, case: str, rotation: str) -> None:
    reader = Reader(model_folder(tmp_path / "model", case, tied=False))
    architecture = find(reader.config["model_type"])
    generator = torch.Generator().manual_seed(0)
    scales = {}
    for number in range(2):
        for linear, _ in equalized(architecture):
            width = reader.headers[f"model.layers.{number}.{linear.name}.weight"].shape[1]
            scale = torch.exp(torch.randn(width, generator=generator))
            name = f"model.layers.{number}.{linear.name}"
            scales[name] = shared_channels(scale, reader.config, linear)
    assert len(scales) == 4
    view = EqualizedReader(reader, architecture, scales, dtype=torch.float64)
    for name in scales:
        assert not torch.equal(view.read(f"{name}.weight"), reader.read(f"{name}.weight").double())
    proof = view
    if rotation is not None:
        proof = RotatedReader(view, architecture, rotation, seed=3, dtype=torch.float64)  # type: ignore[assignment, arg-type]
    exact = logits(reader, torch.float64)
    error = (logits(proof, torch.float64) - exact).abs().max() / exact.abs().max()  # type: ignore[arg-type]
    assert error < 1e-9


def test_heads_that_share_a_value_share_a_scale(tmp_path: Path) -> None:
    reader = Reader(model_folder(tmp_path / "model", "llama", tied=False))
    scales = {"model.layers.0.self_attn.o_proj": torch.arange(1.0, 6 * 32 + 1)}
    with pytest.raises(InputError, match="differ between heads that share a value"):
        EqualizedReader(reader, find("llama"), scales)

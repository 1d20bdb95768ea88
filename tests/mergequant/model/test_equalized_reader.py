"""A model with equalized channels is the same model."""

from pathlib import Path

import pytest
import torch

from mergequant.errors import InputError
from mergequant.model.architectures import ARCHITECTURES, find
from mergequant.model.equalized_reader import EqualizedReader, equalized, shared_channels
from mergequant.model.reader import Reader
from mergequant.model.rotated_reader import RotatedReader
from tests.mergequant.model.same_function import logits, model_folder


@pytest.mark.parametrize("rotation", [None, "offline", "online"])
@pytest.mark.parametrize("case", [*sorted(ARCHITECTURES), "llama-24", "qwen2-24"])
def test_equalized_models_are_the_same_models(tmp_path: Path, case: str, rotation: str) -> None:
    reader = Reader(model_folder(tmp_path / "model", case, tied=False))
    architecture = find(reader.config["model_type"])
    generator = torch.Generator().manual_seed(0)
    scales = {}
    for number in range(2):
        for linear, _ in equalized(architecture):
            name = f"{architecture.block.format(block=number)}.{linear.name}"
            width = reader.headers[f"{name}.weight"].shape[1]
            scale = torch.exp(torch.randn(width, generator=generator))
            scales[name] = shared_channels(scale, reader.config, linear)
    gated = any("mlp_up" in linear.written for linear in architecture.linears)
    assert len(scales) == (4 if gated else 2)
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

"""A rotated model is the same model, and its outliers are gone."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from mergequant.errors import InputError
from mergequant.methods import rotate
from mergequant.methods.rotate import (
    OnlineRotation,
    fold_gain,
    orthogonal,
)
from mergequant.model.architectures import ARCHITECTURES, find
from mergequant.model.architectures.llama import LLAMA
from mergequant.model.decoder import Decoder
from mergequant.model.reader import Reader
from mergequant.model.rotated_reader import RotatedReader, fixed_residual, online_rotations
from mergequant.model.shapes import validate
from tests.mergequant.model.same_function import (
    WINDOWS,
    logits,
    model_folder,
)
from tests.outliers import with_outliers
from tests.tiny import make_model

Kind = Literal["offline", "online"]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", [*sorted(ARCHITECTURES), "llama-24", "qwen2-24"])
@pytest.mark.parametrize("grade", [False, True], ids=["full", "graded"])
def test_rotated_models_are_the_same_models(
    tmp_path: Path, case: str, tied: bool, grade: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotate, "_SMALLEST_GROUP", 32)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)) if grade else None
    reader = Reader(model_folder(tmp_path / "model", case, tied))
    architecture = find(reader.config["model_type"])
    exact, single = logits(reader, torch.float64), logits(reader, torch.float32)
    for kind in ("offline", "online"):
        proof = RotatedReader(reader, architecture, kind, seed=3, order=order, dtype=torch.float64)
        error = (logits(proof, torch.float64) - exact).abs().max() / exact.abs().max()
        assert error < 1e-9
        view = RotatedReader(reader, architecture, kind, seed=3, order=order)
        error = (logits(view, torch.float32) - single).abs().max() / single.abs().max()
        assert error < 1e-4


@pytest.mark.parametrize("left_out", ["mlp.down_proj", "self_attn.o_proj", "layers.0."])
@pytest.mark.parametrize("case", ["llama", "qwen2-24"])
def test_the_server_rotates_nothing_for_what_is_not_quantized(
    tmp_path: Path, case: str, left_out: str
) -> None:
    """Its linears are the server's own, so that their weights must not expect it either."""
    reader = Reader(model_folder(tmp_path / "model", case, tied=False))
    architecture = find(reader.config["model_type"])
    view = RotatedReader(
        reader,
        architecture,
        "online",
        seed=3,
        heads=2,
        unquantized=lambda name: left_out in name,
        dtype=torch.float64,
    )
    assert view.online and not any(left_out in name for name in view.online)
    exact = logits(reader, torch.float64)
    error = (logits(view, torch.float64) - exact).abs().max() / exact.abs().max()
    assert error < 1e-9


def test_every_tensor_that_should_turn_does(tmp_path: Path) -> None:
    """An untouched weight would pass for a rotated one if the rotation were the identity."""
    reader = Reader(model_folder(tmp_path / "model", "llama", tied=True))
    view = RotatedReader(reader, LLAMA, "online", seed=0)
    validate(LLAMA, view.config, view.shapes())
    assert not view.config["tie_word_embeddings"] and view.online == {
        f"model.layers.{number}.mlp.down_proj": OnlineRotation(hadamard=4)
        for number in range(view.config["num_hidden_layers"])
    }
    same = {"q_proj.bias", "k_proj.bias", "gate_proj.bias", "up_proj.bias"}
    for name, entry in view.headers.items():
        tensor = view.read(name)
        assert tuple(tensor.shape) == entry.shape and entry.dtype == "F32"
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor))
        elif name != "lm_head.weight":
            assert torch.equal(tensor, reader.read(name)) == (
                ".".join(name.split(".")[-2:]) in same
            )
    embedding, head = (view.read(f"{x}.weight") for x in ("model.embed_tokens", "lm_head"))
    assert not torch.equal(embedding, head)


def test_16_bit_models_turn_in_float32_and_keep_their_dtype_for_the_outside(
    tmp_path: Path,
) -> None:
    reader = Reader(make_model(tmp_path / "model", "qwen3", dtype=torch.bfloat16, hidden=96))
    view = RotatedReader(reader, find("qwen3"), "offline", seed=0)
    block = view.read_block("model.layers.0")
    assert block["self_attn.q_norm.weight"].dtype == torch.bfloat16
    assert block["input_layernorm.weight"].dtype == torch.bfloat16
    assert block["mlp.down_proj.weight"].dtype == torch.float32
    assert view.headers["model.layers.0.input_layernorm.weight"].dtype == "BF16"
    rounded = view.read_in_source_dtype("lm_head.weight")
    assert torch.equal(rounded, view.read("lm_head.weight").to(torch.bfloat16))


def test_the_decoder_takes_a_view(tmp_path: Path) -> None:
    """Between blocks, the rotated model's hidden states are the plain one's times R1."""
    reader = Reader(model_folder(tmp_path / "model", "qwen2", tied=True))
    plain = hidden_states(reader)
    view = hidden_states(RotatedReader(reader, find("qwen2"), "offline", seed=4))
    error = (view - orthogonal(96, seed=4).rotate(plain)).abs().max()
    assert error / plain.abs().max() < 1e-5


def hidden_states(reader: Reader) -> Tensor:
    """What the blocks leave on the residual: [tokens, n]."""
    decoder = Decoder(reader, find(reader.config["model_type"]), torch.device("cpu"))
    hidden = decoder.embed(WINDOWS, statistics=1, gptq=1).batches
    for number in range(reader.config["num_hidden_layers"]):
        with decoder.block(number) as block:
            hidden = [block.forward(x) for x in hidden]
    return torch.cat(hidden).flatten(0, -2)


def norm_outputs(reader: Reader) -> Tensor:
    """What the first block's attention reads: [tokens, n]."""
    decoder = Decoder(reader, find(reader.config["model_type"]), torch.device("cpu"))
    outputs: list[Tensor] = []
    with decoder.block(0) as block:
        batches = decoder.embed(WINDOWS, statistics=1, gptq=1).batches
        block.observe("self_attn.q_proj", batches, outputs.append)
    return torch.cat(outputs)


def spread(x: Tensor) -> float:
    """Largest over mean of the channels' root mean squares."""
    size = x.square().mean(dim=0).sqrt()
    return float(size.max() / size.mean())


@pytest.mark.parametrize("channels", [96, 128])
def test_outliers_are_spread_out(tmp_path: Path, channels: int) -> None:
    folder = make_model(tmp_path / "plain", hidden=channels)
    reader = Reader(with_outliers(folder, tmp_path / "outliers"))
    view = RotatedReader(reader, LLAMA, "offline", seed=0)
    assert spread(norm_outputs(reader)) > 8
    assert spread(norm_outputs(view)) < 2


def test_a_spiked_residual_is_spread_out(tmp_path: Path) -> None:
    reader = SpikedReader(make_model(tmp_path / "model", hidden=128))
    view = RotatedReader(reader, LLAMA, "offline", seed=0)
    assert spread(hidden_states(reader)) > 15
    assert spread(hidden_states(view)) < 2


class SpikedReader(Reader):
    """A model one of whose residual channels is 100 times larger, as massive activations are."""

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        if name == "model.embed_tokens.weight":
            tensor[:, 5] *= 100
        return tensor


def test_a_norm_that_multiplies_by_one_plus_its_weight(llama: Path) -> None:
    norms = tuple(dataclasses.replace(norm, multiplier="one_plus") for norm in LLAMA.norms)
    gemma = dataclasses.replace(LLAMA, norms=norms)
    reader = Reader(llama)
    view = RotatedReader(reader, gemma, "offline", seed=0, dtype=torch.float64)
    norm, weight = "model.layers.1.post_attention_layernorm.weight", "model.layers.1.mlp.up_proj"
    assert torch.equal(view.read(norm), torch.zeros(64))
    gained = fold_gain(reader.read(f"{weight}.weight"), 1 + reader.read(norm).double())
    expected = gained @ orthogonal(64, seed=0).matrix()
    assert torch.allclose(view.read(f"{weight}.weight"), expected, rtol=0, atol=1e-13)


def test_large_tables_are_rotated_in_parts(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = RotatedReader(Reader(llama), LLAMA, "offline", seed=0)
    whole = view.read("model.embed_tokens.weight")
    monkeypatch.setattr("mergequant.model.rotated_reader.ROWS_AT_ONCE", 100)
    assert torch.allclose(view.read("model.embed_tokens.weight"), whole, rtol=0, atol=1e-6)


def test_refusals(tmp_path: Path, llama: Path) -> None:
    reader = Reader(llama)
    odd = {**reader.config, "intermediate_size": 171}
    with pytest.raises(InputError, match="'online' needs an even intermediate_size"):
        online_rotations(LLAMA, odd, "online")
    assert online_rotations(LLAMA, odd, "offline") == {} == online_rotations(LLAMA, odd, "none")
    unnamed = tuple(space for space in LLAMA.spaces if space.name != "value")
    with pytest.raises(InputError, match="no space 'value' to rotate"):
        RotatedReader(reader, dataclasses.replace(LLAMA, spaces=unnamed), "offline", seed=0)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("llama", None),
        ("opt", "LayerNorm 'self_attn_layer_norm' of opt takes the mean"),
        ("gemma3_text", "'post_attention_layernorm' of gemma3_text does not stand between"),
        ("olmo2", "'post_attention_layernorm' of olmo2 does not stand between"),
    ],
)
def test_some_residuals_stay_as_they_are(model_type: str, reason: str | None) -> None:
    found = fixed_residual(find(model_type))
    assert found == reason if reason is None else reason in str(found)


def test_a_model_whose_residual_stays_keeps_its_tied_head(tmp_path: Path) -> None:
    reader = Reader(model_folder(tmp_path / "model", "opt", tied=True))
    view = RotatedReader(reader, find("opt"), "online", seed=0)
    assert view.config["tie_word_embeddings"]
    hidden = torch.randn(3, 96)
    assert torch.equal(view.residual(hidden), hidden)
    changed = {
        ".".join(name.split(".")[-2:])
        for name in view.headers
        if not torch.equal(view.read(name), reader.read(name))
    }
    assert changed == {"v_proj.weight", "v_proj.bias", "out_proj.weight", "fc2.weight"}


def test_damaged_models_are_named_by_the_source(llama: Path) -> None:
    class Damaged(Reader):
        def read(self, name: str) -> Tensor:
            tensor = super().read(name)
            return tensor / 0 if name == "lm_head.weight" else tensor

    view = RotatedReader(Damaged(llama), LLAMA, "offline", seed=0)
    with pytest.raises(InputError, match=r"'lm_head.weight' .* NaN or infinity"):
        view.check_finite()

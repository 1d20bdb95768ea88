"""A rotated model is the same model, and its outliers are gone."""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from mergequant.errors import InputError
from mergequant.methods import rotate
from mergequant.methods.rotate import (
    OnlineRotation,
    Orthogonal,
    fold_gain,
    graded,
    group_count,
    hadamard,
    hadamard_block,
    orthogonal,
    rotate_reader,
    rotate_writer,
)
from mergequant.model.architecture import Norm, validate
from mergequant.model.architectures import ARCHITECTURES, find
from mergequant.model.architectures.llama import LLAMA
from mergequant.model.decoder import Decoder
from mergequant.model.reader import Reader
from mergequant.model.rotated_reader import RotatedReader, online_rotations
from mergequant_vllm.kernels.hadamard import reference
from tests.outliers import with_outliers
from tests.tiny import make_model

EPS = torch.finfo(torch.float64).eps
SIZES = (1, 2, 3, 24, 32, 64, 80, 96, 127, 128, 129, 768)
Kind = Literal["offline", "online"]
WINDOWS = torch.randint(2, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def rounding_bound(size: int) -> float:
    """Of a product with an orthogonal matrix, relative to the vector: a sum of `size` terms in any
    order, and entries that are each a few roundings off."""
    return (size + 16) * EPS


def correlated(rows: int, columns: int) -> Tensor:
    """Channels that share a mean and a few directions, and one that is 50 times the others."""
    generator = torch.Generator().manual_seed(columns)
    shared = torch.randn(rows, 4, dtype=torch.float64, generator=generator)
    mixing = torch.randn(4, columns, dtype=torch.float64, generator=generator)
    own = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    x = shared @ mixing + 0.3 * own + 1.0
    x[:, columns // 3] *= 50
    return x


@pytest.mark.parametrize("size", SIZES)
def test_rotations_are_orthogonal_and_reach_every_channel(size: int) -> None:
    matrix = orthogonal(size, seed=1).matrix()
    identity = torch.eye(size, dtype=torch.float64)
    assert (matrix @ matrix.T - identity).abs().max() <= 2 * rounding_bound(size)
    assert matrix.abs().max() <= math.sqrt(2 / size) * (1 + 8 * EPS) or size == 1
    assert matrix.abs().min() > 0.01 / size


@pytest.mark.parametrize("size", SIZES)
def test_factors_equal_the_matrix(size: int) -> None:
    rotation = orthogonal(size, seed=2)
    x = correlated(7, 3 * size)
    blocks = torch.block_diag(*[rotation.matrix()] * 3)
    bound = 2 * rounding_bound(size) * x.norm(dim=1).max()
    assert (rotation.rotate(x) - x @ blocks).abs().max() <= bound
    assert (rotate_writer(x.T, rotation) - blocks.T @ x.T).abs().max() <= bound
    assert (rotate_writer(x[0], rotation) - x[0] @ blocks).abs().max() <= bound


def test_factors_need_not_be_symmetric() -> None:
    """Hadamard's and Hartley's are; a learned rotation is not."""
    factors = tuple(torch.linalg.qr(correlated(size, size)).Q for size in (3, 4, 5))
    rotation = Orthogonal(signs=orthogonal(60, seed=3).signs, factors=factors)
    x = correlated(7, 60)
    bound = 2 * rounding_bound(60) * x.norm(dim=1).max()
    assert (rotation.rotate(x) - x @ rotation.matrix()).abs().max() <= bound


@pytest.mark.parametrize(("size", "groups"), [(576, 3), (4096, 4), (256, 4), (325, 5), (130, 2)])
def test_a_graded_rotation_mixes_channels_of_a_group_evenly(size: int, groups: int) -> None:
    assert group_count(size) == groups
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    rotation, each = graded(order, seed=1), size // groups
    matrix, x = rotation.matrix(), correlated(7, 2 * size)
    identity = torch.eye(size, dtype=torch.float64)
    assert (matrix @ matrix.T - identity).abs().max() <= 2 * rounding_bound(size)
    bound = 2 * rounding_bound(size) * x.norm(dim=1).max()
    assert (rotation.rotate(x) - x @ torch.block_diag(matrix, matrix)).abs().max() <= bound
    within = torch.block_diag(*[torch.ones(each, each)] * groups).bool()
    assert (matrix[order][~within] == 0).all()
    assert matrix[order][within].abs().max() <= math.sqrt(2 / each) * (1 + 8 * EPS)
    assert matrix[order][within].abs().min() > 0.01 / each


@pytest.mark.parametrize("size", [64, 96, 127, 191])
def test_few_channels_are_one_group(size: int) -> None:
    assert group_count(size) == 1


@pytest.mark.parametrize("grade", [False, True])
def test_what_is_rotated_stays_on_its_device(grade: bool) -> None:
    rotation = graded(torch.arange(192), seed=0) if grade else orthogonal(192, seed=0)
    assert rotation.rotate(torch.empty(2, 3, 192, device="meta")).device.type == "meta"


def test_seeds_make_rotations() -> None:
    one, same, other = (orthogonal(96, seed).signs for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("size", [96, 128, 768])
def test_a_common_mean_does_not_gather_in_one_channel(size: int) -> None:
    """Embeddings have a mean; Sylvester's first column alone would add it up to sqrt(n) times."""
    rotated = orthogonal(size, seed=0).rotate(torch.ones(size))
    assert rotated.abs().max() < 0.55 * math.sqrt(size)
    assert torch.ones(size, dtype=torch.float64).norm() == pytest.approx(float(rotated.norm()))


@pytest.mark.parametrize("block", [2, 4, 32, 128])
def test_offline_and_online_hadamard_are_each_others_inverse(block: int) -> None:
    weight, x = correlated(5, 3 * block), correlated(9, 3 * block)
    rotated = rotate_reader(weight, hadamard(block))
    bound = 2 * rounding_bound(block) * weight.norm(dim=1).max()
    assert (rotated - reference.rotate_by_matrix(weight, block)).abs().max() <= bound
    y = reference.rotate(x, block) @ rotated.T
    error = (y - x @ weight.T).abs().max()
    assert error <= 4 * rounding_bound(3 * block) * x.norm(dim=1).max() * weight.norm(dim=1).max()


def test_hadamard_blocks() -> None:
    widths = {11008: 128, 14336: 128, 352: 32, 172: 4, 27: 1, 11008 // 8: 32, 11008 // 4: 64}
    assert {width: hadamard_block(width) for width in widths} == widths
    assert hadamard_block(11008, most=64) == 64
    with pytest.raises(ValueError, match="at least one channel"):
        hadamard_block(0)


class ExactNorm(nn.Module):
    """An RMSNorm in the input's dtype: transformers' own computes in float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


def in_float64(rotation: OnlineRotation, x: Tensor) -> Tensor:
    """What the server does to an input, by full matrices and without its rounding."""
    if rotation.heads is not None:
        x = reference.mix_heads_by_matrix(x, rotation.heads)
    return x if rotation.hadamard is None else reference.rotate_by_matrix(x, rotation.hadamard)


def logits(reader: Reader, dtype: torch.dtype) -> Tensor:
    """What `transformers` computes from a reader's tensors and configuration."""
    config = AutoConfig.from_pretrained(str(reader.folder))
    config.tie_word_embeddings = reader.config.get("tie_word_embeddings", False)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    tensors = {name: reader.read(name) for name in reader.headers}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    for name, module in list(model.named_modules()):
        if dtype == torch.float64 and type(module).__name__.endswith("RMSNorm"):
            parent, _, child = name.rpartition(".")
            exact = ExactNorm(module.weight.data, module.variance_epsilon)
            setattr(model.get_submodule(parent), child, exact)
    for name, rotation in reader.online.items():
        for linear in (m for full, m in model.named_modules() if full.endswith(name)):
            rotated = partial(in_float64, rotation) if dtype == torch.float64 else rotation
            linear.register_forward_pre_hook(
                lambda _, inputs, rotated=rotated: (rotated(inputs[0]),)
            )
    with torch.no_grad():
        result: Tensor = model(WINDOWS, use_cache=False).logits
    return result


def as_heads_of_24(folder: Path) -> Path:
    """6 and 3 heads of 32 channels are as many as 8 and 4 heads of 24."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 24}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def model_folder(folder: Path, case: str, tied: bool) -> Path:
    """A model with 96 channels, three value heads, and all biases that its kind may have."""
    model_type = case.removesuffix("-24")
    biases = {
        "llama": {"attention_bias": True, "mlp_bias": True},
        "qwen3": {"attention_bias": True},
    }
    make_model(
        folder,
        model_type,
        hidden=96,
        heads=6,
        kv_heads=3,
        tied=tied,
        **biases.get(model_type, {}),
    )
    return as_heads_of_24(folder) if case.endswith("-24") else folder


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
    after = Norm("post_feedforward_layernorm", reads="mlp_out", writes="residual")
    sandwich = dataclasses.replace(LLAMA, norms=(*LLAMA.norms, after))
    with pytest.raises(InputError, match=r"Norm 'post_feedforward_layernorm' .* rotation 'none'"):
        RotatedReader(reader, sandwich, "offline", seed=0)
    unnamed = tuple(space for space in LLAMA.spaces if space.name != "value")
    with pytest.raises(InputError, match="no space 'value' to rotate"):
        RotatedReader(reader, dataclasses.replace(LLAMA, spaces=unnamed), "offline", seed=0)


def test_damaged_models_are_named_by_the_source(llama: Path) -> None:
    class Damaged(Reader):
        def read(self, name: str) -> Tensor:
            tensor = super().read(name)
            return tensor / 0 if name == "lm_head.weight" else tensor

    view = RotatedReader(Damaged(llama), LLAMA, "offline", seed=0)
    with pytest.raises(InputError, match=r"'lm_head.weight' .* NaN or infinity"):
        view.check_finite()

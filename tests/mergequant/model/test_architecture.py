"""Tables cover real Hugging Face models, each tensor once; strangers are refused by name."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mergequant.errors import InputError
from mergequant.model.architecture import model_tensors, validate, widths
from mergequant.model.architectures import ARCHITECTURES, find

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def config_and_shapes(model_type: str, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    config = AutoConfig.for_model(model_type, **SIZES, **more)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    names = {name for name, _ in model.named_parameters()}  # a tied head is listed once
    shapes = {x: tuple(t.shape) for x, t in model.state_dict().items() if x in names}
    return config.to_dict(), shapes


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize("tied", [False, True])
def test_the_table_names_every_tensor_of_the_real_model(model_type: str, tied: bool) -> None:
    config, shapes = config_and_shapes(model_type, tie_word_embeddings=tied)
    assert model_tensors(find(model_type), config) == shapes
    validate(find(model_type), config, shapes)


def test_llamas_optional_biases_are_covered() -> None:
    config, shapes = config_and_shapes("llama", attention_bias=True, mlp_bias=True)
    assert "model.layers.0.mlp.down_proj.bias" in shapes
    validate(find("llama"), config, shapes)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_each_matrix_of_a_block_has_exactly_one_input(model_type: str) -> None:
    architecture = find(model_type)
    named = [linear.name for readers in architecture.readers() for linear in readers.linears]
    assert sorted(named) == sorted(linear.name for linear in architecture.linears)
    with_norm = [readers.norm.name for readers in architecture.readers() if readers.norm]
    assert with_norm == ["input_layernorm", "post_attention_layernorm"]


def test_spaces_that_tables_name_exist() -> None:
    for architecture in ARCHITECTURES.values():
        names = {space.name for space in architecture.spaces}
        for linear in (*architecture.linears, architecture.head, architecture.embedding):
            assert {linear.reads, linear.writes} <= names
        assert {space.width for space in architecture.spaces} <= widths(SIZES).keys()


def test_an_unknown_model_type_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"'gpt2' is unknown: mergequant knows llama, mistral"):
        find("gpt2")
    with pytest.raises(InputError, match="None is unknown"):
        find(None)


def test_missing_unknown_and_misshapen_tensors_are_named() -> None:
    config, shapes = config_and_shapes("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    without = {key: shape for key, shape in shapes.items() if key != name}
    with pytest.raises(InputError, match=f"{name}.*not in the model's files"):
        validate(find("llama"), config, without)
    with pytest.raises(InputError, match=r"model.layers.0.moe.weight' is not part of"):
        validate(find("llama"), config, {**shapes, "model.layers.0.moe.weight": (1, 1)})
    with pytest.raises(InputError, match=rf"{name}' has shape \[1, 2\], but config.json"):
        validate(find("llama"), config, {**shapes, name: (1, 2)})


def test_leftovers_of_old_checkpoints_are_ignored() -> None:
    config, shapes = config_and_shapes("llama", tie_word_embeddings=True)
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (16,)
    shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    validate(find("llama"), config, shapes)

"""Tables cover real Hugging Face models, each tensor once; strangers are refused by name."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mergequant.errors import InputError
from mergequant.model.architectures import ARCHITECTURES, find
from mergequant.model.settled_config import settle
from mergequant.model.shapes import model_tensors, validate, widths
from tests.tiny import sizes

SIZES = {"vocab_size": 99, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}


def config_and_shapes(model_type: str, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    fields = {**sizes(model_type, 64, 172, 3, 4, 2), **more}
    config = AutoConfig.for_model(model_type, **SIZES, **fields)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    names = {name for name, _ in model.named_parameters()}  # a tied head is listed once
    shapes = {x: tuple(t.shape) for x, t in model.state_dict().items() if x in names}
    stored = {_stored(model_type, name): shape for name, shape in shapes.items()}
    return settle(config.to_dict()), stored


def _stored(model_type: str, name: str) -> str:
    """A tensor's name in a file for that in transformers."""
    head = find(model_type).head.name
    theirs = find(model_type).in_transformers(head)
    return head + name.removeprefix(theirs) if name.startswith(f"{theirs}.") else name


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


def test_spaces_that_tables_name_exist() -> None:
    for architecture in ARCHITECTURES.values():
        names = {space.name for space in architecture.spaces}
        for linear in (*architecture.linears, architecture.head, architecture.embedding):
            assert {linear.reads, *linear.written} <= names
        for norm in (*architecture.norms, architecture.final_norm):
            assert {norm.reads, norm.writes} <= names
        known = widths(config_and_shapes("llama")[0]).keys()
        assert {space.width for space in architecture.spaces} <= known


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

"""Old names of sizes and of tensors, and defaults that files leave out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergequant.errors import InputError
from mergequant.model.reader import Reader
from mergequant.model.settled_config import for_generation, settle
from tests.tiny import make_model


def test_sizes_get_their_usual_names() -> None:
    bloom = {"model_type": "bloom", "n_embed": 64, "n_layer": 3, "num_attention_heads": 4}
    settled = settle({**bloom, "vocab_size": 99})
    assert settled["hidden_size"] == 64 and settled["num_hidden_layers"] == 3
    assert settled["intermediate_size"] == 256 and settled["tie_word_embeddings"] is True
    opt = settle({"model_type": "opt", "hidden_size": 64, "ffn_dim": 100})
    assert opt["intermediate_size"] == 100 and opt["enable_bias"] is True


def test_what_stands_is_not_changed() -> None:
    given = {"model_type": "llama", "hidden_size": 64, "attention_bias": True, "mine": 1}
    settled = settle(given)
    assert {key: settled[key] for key in given} == given
    assert settled["mlp_bias"] is False


def test_heads_that_a_file_leaves_out_are_those_of_transformers() -> None:
    settled = settle({"model_type": "gemma2", "hidden_size": 64, "num_attention_heads": 8})
    assert settled["head_dim"] == 256 and settled["num_key_value_heads"] == 4
    assert (
        settle({"model_type": "bloom", "hidden_size": 64, "intermediate_size": None})[
            "intermediate_size"
        ]
        == 256
    )


def test_leftovers_of_old_files_are_not_read(tmp_path: Path) -> None:
    """Pythia's files hold a mask whose numbers are infinite in float16."""
    folder = make_model(tmp_path / "model", "gpt_neox")
    tensors = load_file(folder / "model.safetensors")
    name = "gpt_neox.layers.0.attention.masked_bias"
    save_file({**tensors, name: torch.tensor(-torch.inf)}, folder / "model.safetensors")
    reader = Reader(folder)
    assert name not in reader.headers
    reader.check_finite()


def test_what_vllm_reads_elsewhere_is_said_there_too() -> None:
    positions = {"original_max_position_embeddings": 4096, "llama_4_scaling_beta": 0.2}
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0, **positions}
    settled = settle({"model_type": "ministral3", "rope_parameters": rope})
    expected = {"original_max_position_embeddings": 4096, "beta": 0.2}
    assert settled["llama_4_scaling"] == expected
    # A file that says nothing means transformers' defaults; one without the factor means nothing.
    assert settle({"model_type": "ministral3"})["llama_4_scaling"]["beta"] == 0.1
    old = {"rope_theta": 10_000.0, "rope_scaling": {x: rope[x] for x in rope if x != "rope_theta"}}
    assert settle({"model_type": "ministral3", **old})["llama_4_scaling"] == expected
    equal = {"model_type": "ministral3", "rope_parameters": rope, "llama_4_scaling": expected}
    assert settle(equal)["llama_4_scaling"] == expected
    with pytest.raises(InputError, match=r"which vLLM reads, and elsewhere"):
        settle({**equal, "llama_4_scaling": {**expected, "beta": 0.3}})
    broken = settle({"model_type": "ministral3", "num_attention_heads": "x"})
    assert "llama_4_scaling" not in broken  # what transformers refuses is said elsewhere
    del rope["llama_4_scaling_beta"]
    with pytest.raises(InputError, match=r"has no rope_parameters\.llama_4_scaling_beta"):
        settle({"model_type": "ministral3", "rope_parameters": rope})


def test_what_generates_is_a_class_with_a_head() -> None:
    served = for_generation({"model_type": "bloom", "architectures": ["BloomModel"]})
    assert served == {"architectures": ["BloomForCausalLM"]}
    scaled = {"model_type": "ministral3", "llama_4_scaling": {"beta": 0.1}}
    assert for_generation(scaled) == {
        "architectures": ["Ministral3ForCausalLM"],
        "llama_4_scaling": {"beta": 0.1},
    }
    assert for_generation({"model_type": "gpt2", "architectures": ["X"]}) == {}


@pytest.mark.parametrize("model_type", ["gpt2", None])
def test_an_unknown_type_comes_back_as_it_is(model_type: str | None) -> None:
    config = {"model_type": model_type, "n_layer": 2}
    assert settle(config) == config


def test_what_transformers_refuses_comes_back_as_it_is() -> None:
    config = {"model_type": "llama", "hidden_size": "many"}
    assert settle(config)["hidden_size"] == "many"


def test_a_model_saved_without_its_head_has_the_whole_models_names(tmp_path: Path) -> None:
    whole = Reader(make_model(tmp_path / "model", "bloom"))
    file = whole.folder / "model.safetensors"
    tensors = load_file(file)
    names = set(whole.headers)
    body = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    save_file(body, file, metadata={"format": "pt"})
    config = json.loads((whole.folder / "config.json").read_text())
    reader = Reader(whole.folder)
    assert set(reader.headers) == names and config["model_type"] == "bloom"
    name = "transformer.h.1.mlp.dense_h_to_4h.weight"
    assert torch.equal(reader.read(name), tensors[name])

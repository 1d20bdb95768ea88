"""Configurations that disagree with the weights, with transformers or with the server."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mergequant import quantize
from mergequant.errors import InputError
from mergequant.evaluate.perplexity import perplexity, reference_logits
from mergequant.evaluate.reference_forward import load_model
from mergequant.model.architectures import ARCHITECTURES
from mergequant.model.hugging_face_config import load_config, refuse_unserved
from mergequant.model.reader import Reader
from mergequant.quantizer.prepare import open_folder
from tests.conftest import FEW
from tests.tiny import make_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
AS_IT_IS = FEW.model_copy(update={"head_bits": 16})


def edit(model: Path, **fields: object) -> Path:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return model


def with_tensors(model: Path, **tensors: torch.Tensor | None) -> Path:
    file = model / "model.safetensors"
    changed = {**load_file(file), **{name.replace("__", "."): x for name, x in tensors.items()}}
    save_file({k: x for k, x in changed.items() if x is not None}, file, {"format": "pt"})
    return model


def logits(model: Path) -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return loaded(torch.arange(8)[None]).logits


def test_a_stored_head_is_used_though_the_configuration_ties_it(
    tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(tmp_path / "model")
    untied = logits(model)
    edit(model, tie_word_embeddings=True)
    assert torch.equal(logits(model), untied)  # transformers uses it
    output = quantize(model, tmp_path / "out", [text], AS_IT_IS, progress=False)
    said = "is stored and differs from the embedding: it is the head"
    assert caplog.text.count(said) == 1  # however often a run opens its model
    stored = Reader(output)
    assert stored.config["tie_word_embeddings"] is False
    assert torch.equal(stored.read(HEAD), load_file(model / "model.safetensors")[HEAD])


def test_a_stored_head_that_is_the_embedding_is_tied(tmp_path: Path, text: Path) -> None:
    model = make_model(tmp_path / "model", tied=True)
    table = load_file(model / "model.safetensors")[EMBEDDING]
    with_tensors(model, lm_head__weight=table.clone())
    output = quantize(model, tmp_path / "out", [text], AS_IT_IS, progress=False)
    stored = Reader(output)
    assert stored.config["tie_word_embeddings"] is True and HEAD not in stored.headers


def test_without_a_head_the_embedding_is_it_though_nothing_ties_them(
    tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_tensors(make_model(tmp_path / "model"), lm_head__weight=None)
    output = quantize(model, tmp_path / "out", [text], AS_IT_IS, progress=False)
    assert "its embedding is the head" in caplog.text
    assert Reader(output).config["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_position_embeddings": 128.0}, "max_position_embeddings.*expected int, got float"),
        ({"eos_token_id": "1"}, "eos_token_id"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers.*expected int, got str"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    ],
)
def test_what_transformers_refuses_is_refused_by_name_and_first(
    tmp_path: Path, text: Path, fields: dict[str, Any], message: str
) -> None:
    model = edit(make_model(tmp_path / "model"), **fields)
    with pytest.raises(InputError, match=rf"refuses .*config\.json \(.*{message}"):
        quantize(model, tmp_path / "out", [text], FEW, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("padding", [258, 10_000, -1])
def test_a_padding_token_without_a_row_is_left_out(
    tmp_path: Path, text: Path, padding: int
) -> None:
    model = edit(make_model(tmp_path / "model"), pad_token_id=padding)
    assert load_config(model).pad_token_id is None
    output = quantize(model, tmp_path / "out", [text], FEW, progress=False)
    losses = [
        perplexity(x, text, engine="transformers", window=32, most_windows=2, progress=False).loss
        for x in (model, output)
    ]
    assert abs(losses[0] - losses[1]) < 1
    assert load_config(edit(model, pad_token_id=5)).pad_token_id == 5


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, 'hidden_act "gelu", and llama is served only with'),
        ("qwen3", {"attention_bias": True}, "attention_bias true, and qwen3 is served only"),
        ("mistral", {"bias": True}, "bias true, and mistral is served only with false"),
        ("llama", {"sliding_window": 8, "use_sliding_window": False}, "sliding_window 8 for llama"),
        ("phi3", {"rope_scaling": {"type": "su"}, "rope_parameters": None}, "write 'longrope'"),
        (
            "qwen2",
            {"dual_chunk_attention_config": {"chunk_size": 64}},
            "qwen2 is served only with null",
        ),
        ("llama", {"qkv_bias": True}, "has qkv_bias true, which vLLM reads, and attention_bias"),
        ("llama", {"qkv_bias": None, "attention_bias": True}, "has qkv_bias null, which vLLM"),
        ("llama", {"is_causal": False}, "has is_causal false, and llama is served only with true"),
        ("llama", {"is_causal": None}, "has is_causal null, and llama is served only with true"),
        ("exaone4", {"logit_scale": 0.5}, "exaone4 is served only with 1.0"),
        ("granite", {"layer_types": ["full_attention"] * 2}, "granite is served only with null"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "is served only with false"),
        ("stablelm", {"norm_eps": 1e-3}, "has norm_eps 0.001, which vLLM reads, and layer"),
        ("qwen2", {"qk_norm": True}, "qwen2 is served only with false"),
        ("qwen2", {"head_dim": 48}, "has head_dim 48, and vLLM serves qwen2 only with heads of"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "has partial_rotary_factor 0.5, which vLLM applies to llama and transformers does not",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
            "has partial_rotary_factor 0.5",
        ),
        ("qwen3", {"rotary_pct": 0.25}, "has rotary_pct 0.25, which vLLM applies to qwen3"),
        ("cohere", {"sliding_window": 8}, "sliding_window 8 for cohere, which transformers and"),
        ("exaone4", {"sliding_window_pattern": "LLLG", "layer_types": None}, "write layer_types,"),
        ("exaone4", {"sliding_window_pattern": None, "layer_types": None}, "write layer_types,"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
            "has mrope_section of a model that also takes images",
        ),
        ("opt", {"do_layer_norm_before": False}, "change the field if this one was not trained"),
        ("qwen2", {"mrope_section": [2, 3, 3]}, "has mrope_section of a model that also takes"),
        (
            "qwen2",
            {"rope_parameters": None, "rope_scaling": {"type": "mrope"}},
            "has the rope type 'mrope' of a model that also takes images",
        ),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_dim": 16}}, "has rope_dim 16"),
        ("cohere2", {"sliding_window": None, "layer_types": None}, "sliding_window has no size"),
        ("cohere2", {"sliding_window": None}, "sliding_window has no size"),
        ("gemma2", {"sliding_window": 0}, "sliding_window has no size"),
        ("exaone4", {"sliding_window": None}, "sliding_window has no size"),
        ("exaone4", {"hidden_act": 3}, "refuses .*hidden_act"),
        ("exaone4", {"layer_types": ["full_attention"] * 2, "sliding_window": 8}, "set it to null"),
        ("mistral", {"layer_types": ["full_attention"] * 2, "sliding_window": 8}, "set it to null"),
        ("llama", {"rope_parameters": {"rope_type": "ntk", "factor": 2.0}}, "by rope type 'ntk'"),
        (
            "qwen2",
            {
                "layer_types": None,
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
            },
            r"some blocks a sliding window \(full_attention, sliding_attention\)",
        ),
        (
            "mistral",
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
            "does not serve that for mistral",
        ),
        (
            "llama",
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8},
            "does not serve that for llama",
        ),
    ],
)
def test_what_the_server_cannot_do_is_found_before_quantizing(
    tmp_path: Path, kind: str, fields: dict[str, Any], message: str
) -> None:
    model = edit(make_model(tmp_path / "model", kind), **fields)
    with pytest.raises(InputError, match=message):
        open_folder(model)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", {"layer_types": ["full_attention"] * 2}),
        ("llama", {"sliding_window": 64, "max_position_embeddings": 64}),
        ("gemma2", {"use_bidirectional_attention": None}),
        ("stablelm", {"norm_eps": 1e-6, "layer_norm_eps": 1e-6, "partial_rotary_factor": 0.25}),
        ("llama", {"qkv_bias": True, "attention_bias": True}),
        ("olmo2", {"rotary_pct": 0.5}),
        ("cohere2", {"head_dim": 48, "hidden_size": 128, "num_attention_heads": 4}),
        ("gpt_neox", {"rotary_pct": 0.25}),
        ("llama", {"partial_rotary_factor": 1.0, "logit_scale": 1.0}),
        ("qwen2", {"head_dim": 16, "hidden_size": 64, "num_attention_heads": 4}),
    ],
)
def test_what_the_server_can_do_is_taken(kind: str, fields: dict[str, Any]) -> None:
    refuse_unserved(ARCHITECTURES[kind], {"num_hidden_layers": 2, **fields})


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("qwen2", {"layer_types": ["full_attention"] * 2, "sliding_window": 8}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 2, "sliding_window": 8}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 8, "layer_types": None}),
    ],
)
def test_a_window_that_neither_library_applies_is_no_matter(
    tmp_path: Path, kind: str, fields: dict[str, Any]
) -> None:
    open_folder(edit(make_model(tmp_path / "model", kind), **fields))


@pytest.mark.parametrize(
    ("kind", "given", "settled"),
    [
        ("ernie4_5", "Ernie4_5_ForCausalLM", "Ernie4_5ForCausalLM"),
        ("llama", "LLaMAForCausalLM", "LlamaForCausalLM"),
        ("bloom", "BloomModel", "BloomModel"),
        ("qwen2", "Qwen2ForRewardModel", "Qwen2ForRewardModel"),
    ],
)
def test_classes_of_code_beside_the_weights_are_renamed(
    tmp_path: Path, kind: str, given: str, settled: str
) -> None:
    model = edit(make_model(tmp_path / "model", kind), architectures=[given])
    assert open_folder(model)[0].config["architectures"] == [settled]


def test_values_that_mean_nothing_are_mended(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2, "rope_theta": 10_000.0}
    fields = {"sliding_window": 0, "pad_token_id": 10_000, "architectures": None}
    plain = make_model(tmp_path / "plain", "mistral", rope_parameters=rope, sliding_window=None)
    model = make_model(tmp_path / "model", "mistral")
    edit(model, **fields, rope_parameters=rope, attn_implementation="flash_attention_2")
    config = open_folder(model)[0].config
    assert config["sliding_window"] is None and config["pad_token_id"] is None
    assert config["architectures"] == ["MistralForCausalLM"]
    assert isinstance(config["rope_parameters"]["factor"], float)
    edit(plain, architectures=None)
    x = torch.arange(1, 40)[None]
    assert torch.equal(*(reference_logits(load_model(folder), x) for folder in (model, plain)))

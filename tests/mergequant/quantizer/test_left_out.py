"""What a model type does not allow is said; BLOOM's loader wants fused linears undescribed."""

from pathlib import Path

import pytest

from mergequant import Options, quantize
from mergequant.errors import InputError
from mergequant.model.architectures import find
from mergequant.model.reader import Reader
from mergequant.quantizer.left_out import left_out
from mergequant_vllm.format import DynamicInput, parse
from tests.conftest import FEW
from tests.tiny import make_model


@pytest.mark.parametrize(
    ("model_type", "fields", "said"),
    [
        ("llama", {}, []),
        ("opt", {}, ["not rotated (R1)", "The head stays in 16 bits"]),
        ("opt", {"rotation": "none", "head_bits": 16}, []),
        ("olmo2", {}, ["not rotated (R1)", "No norm of olmo2"]),
        ("gemma2", {"rotation": "none"}, ["The head stays in 16 bits"]),
        (
            "phi",
            {"activations": "fully_static", "rotation": "none"},
            [
                "An activation function stands between",
                "--override 'static_bits=8@re:.*self_attn.dense'",
            ],
        ),
        (
            "llama",
            {"activations": "fully_static", "rotation": "none"},
            ["re:.*self_attn.o_proj' --override 'static_bits=8@re:.*mlp.down_proj'"],
        ),
        ("llama", {"activations": "fully_static", "rotation": "none", "static_bits": 8}, []),
        (
            "llama",
            {
                "activations": "fully_static",
                "rotation": "none",
                "overrides": {"re:.*(o|down)_proj": {"static_bits": 8}},
            },
            [],
        ),
    ],
)
def test_sentences(model_type: str, fields: dict[str, object], said: list[str]) -> None:
    sentences = list(left_out(find(model_type), Options.model_validate(fields), {}))
    assert len(sentences) == len(said)
    assert all(part in sentence for part, sentence in zip(said, sentences, strict=True))


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "serve with --max-model-len 128 at most"),
        (
            {"rope_type": "longrope", "original_max_position_embeddings": 64},
            "as soon as --max-model-len passes 64",
        ),
    ],
)
def test_positions_that_vllm_stretches_otherwise_are_said(
    rope: dict[str, object], said: str
) -> None:
    config = {"rope_parameters": rope, "max_position_embeddings": 128}
    (sentence,) = left_out(find("llama"), Options(), config)
    assert said in sentence


@pytest.mark.parametrize(
    ("name", "told"),
    [("BloomModel", True), ("BloomForCausalLM", False), ("BloomForRewardModel", False)],
)
def test_a_class_that_vllm_takes_for_one_that_embeds_is_said(name: str, told: bool) -> None:
    options = Options(rotation="none", head_bits=16)
    config = {"architectures": [name], "model_type": "bloom"}
    said = " ".join(left_out(find("bloom"), options, config))
    assert ("name BloomForCausalLM in its place" in said) == told


@pytest.mark.parametrize(
    ("kinds", "context", "told"),
    [
        (["sliding_attention", "full_attention"], 128, True),
        (None, 128, True),
        (["full_attention"] * 2, 128, False),
        (["sliding_attention", "full_attention"], 64, False),
    ],
)
def test_windows_that_vllm_has_otherwise_are_said(
    kinds: list[str] | None, context: int, told: bool
) -> None:
    config = {"layer_types": kinds, "sliding_window": 64, "max_position_embeddings": context}
    said = list(left_out(find("cohere2"), Options(rotation="none", head_bits=16), config))
    assert len(said) == told and all("--max-model-len 64 at most" in x for x in said)


@pytest.mark.parametrize(
    "fields",
    [
        {"reconstruction": "pad", "alpha": 0.0, "max_extra_channels": 0.5},
        {"activations": "dynamic"},
    ],
)
def test_bloom_refuses_what_its_loader_would_reorder(
    tmp_path: Path, text: Path, fields: dict[str, object]
) -> None:
    model = make_model(tmp_path / "model", "bloom")
    options = FEW.model_copy(update=fields)
    with pytest.raises(InputError, match=r"vLLM reorders every tensor of .*query_key_value"):
        quantize(model, tmp_path / "out", [text], options, progress=False)
    assert not (tmp_path / "out").exists()


def test_only_the_whole_model_can_be_fully_static() -> None:
    override = {"re:.*o_proj": {"activations": "fully_static"}}
    with pytest.raises(ValueError, match="only the whole model can be fully static"):
        Options.model_validate({"overrides": override})


def test_a_linear_of_a_fully_static_model_may_have_a_step_per_token(
    tmp_path: Path, llama: Path, text: Path
) -> None:
    fields = {"activations": "fully_static", "rotation": "none"}
    overrides = {"re:.*down_proj": {"activations": "static", "dynamic_bits": 8}}
    options = FEW.model_copy(update={**fields, "overrides": overrides})
    folder = quantize(llama, tmp_path / "out", [text], options, progress=False)
    linears = parse(Reader(folder).config["quantization_config"]).block_linears(0)
    assert linears["self_attn.o_proj"].static is not None
    assert linears["mlp.down_proj"].input == DynamicInput(bits=8)


@pytest.mark.parametrize("field", ["reconstruction", "staggered", "segments"])
def test_overrides_that_mean_something_behind_norms_alone_are_refused(
    tmp_path: Path, llama: Path, text: Path, field: str
) -> None:
    value = {"reconstruction": "prune", "staggered": False, "segments": 2}[field]
    update = {"activations": "fully_static", "overrides": {"re:.*down_proj": {field: value}}}
    options = FEW.model_copy(update=update)
    with pytest.raises(InputError, match=f"sets {field}, which means something behind a norm"):
        quantize(llama, tmp_path / "out", [text], options, progress=False)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rotation": "online"}, "leave the server nothing to rotate"),
        ({"average_bits": 5.0}, "take their widths from --static-bits alone"),
        ({"within": 0.1}, "take their widths from --static-bits alone"),
        ({"mix_heads": 2}, "leave no heads to mix"),
    ],
)
def test_fully_static_activations_refuse_what_they_cannot_have(
    fields: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Options.model_validate({"activations": "fully_static", **fields})

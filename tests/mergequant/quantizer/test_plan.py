"""Layers that differ: what patterns and overrides make of a model, and what is refused at once."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import JsonValue
from typer.testing import CliRunner

from mergequant import InputError, Options, quantize
from mergequant.cli import app
from mergequant.cli_flags import read_options
from mergequant.model.architectures import find
from mergequant.model.reader import Reader
from mergequant.quantizer.inputs.dynamic import DynamicInputPlan
from mergequant.quantizer.inputs.static import StaticInputPlan
from mergequant.quantizer.plan import Plan
from mergequant.quantizer.prepare import open_model
from mergequant.quantizer.resolve import make_plan, samples_of
from mergequant_vllm.format import parse
from tests.conftest import SMALL
from tests.tiny import make_model

GATE_UP = r"re:model\.layers\.1\.mlp\.(gate|up)_proj"


def plan(llama: Path, **changes: Any) -> Plan:
    options = Options.model_validate({**SMALL.model_dump(), "alpha": 0.0, **changes})
    return make_plan(find("llama"), Reader(llama).config, options, "")


def test_overrides_reach_the_layers_that_they_name_and_no_other(llama: Path) -> None:
    made = plan(llama, overrides={GATE_UP: {"weight_bits": 8, "static_bits": 8}})
    bits = {
        (number, name): (form.weight.bits, form.input.bits)
        for number, block in enumerate(made.blocks)
        for name, form in block.formats.items()
    }
    named = {(1, "mlp.gate_proj"), (1, "mlp.up_proj")}
    assert all(widths == ((8, 8) if key in named else (4, 4)) for key, widths in bits.items())
    (source,) = (x.input for x in made.blocks[1].readers if "mlp.up_proj" in x.weights)
    assert isinstance(source, StaticInputPlan) and (source.bits, source.weight_bits) == (8, 8)
    assert len(made.checkpoint.targets) == 4


def test_windows_for_gptq_are_by_the_widest_input_and_half_where_nothing_is_trained(
    llama: Path,
) -> None:
    def windows(**changes: object) -> int:
        options = Options.model_validate({"statistics_samples": 2, **changes})
        return samples_of(options, find("llama"), Reader(llama).config, length=32).hessians

    widest = 172  # of down
    assert windows() == -(-21 * widest // 32)
    assert windows(compensation_rank=0) == -(-21 * widest // 64)
    assert windows(statistics_samples=500) == 500
    assert windows(gptq_samples=3, statistics_samples=500) == 3
    assert windows(weights="rtn") == 2


def test_of_several_overrides_the_later_one_counts(llama: Path) -> None:
    made = plan(
        llama,
        overrides={
            "re:.*down_proj": {"weight_bits": 8, "dynamic_bits": 8},
            "model.layers.0.mlp.down_proj": {"weight_bits": 3},
        },
    )
    first, second = (block.formats["mlp.down_proj"] for block in made.blocks)
    assert (first.weight.bits, first.input.bits) == (3, 8)
    assert (second.weight.bits, second.input.bits) == (8, 8)


def test_a_linear_that_is_ignored_is_in_no_plan_and_no_target(llama: Path) -> None:
    made = plan(llama, ignore=("re:.*o_proj", "re:model.layers.0.self_attn.[qkv]_proj"))
    names = [
        {name for readers in block.readers for name in readers.weights} for block in made.blocks
    ]
    assert names[0] == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert "self_attn.q_proj" in names[1] and "self_attn.o_proj" not in names[1]
    assert all(
        block.formats.keys() == linears for block, linears in zip(made.blocks, names, strict=True)
    )
    kinds = [type(readers.input) for readers in made.blocks[0].readers]
    assert kinds == [StaticInputPlan, DynamicInputPlan]


def test_what_vllm_merges_must_be_alike(llama: Path) -> None:
    with pytest.raises(InputError, match=r"q_proj and .*k_proj must be quantized alike.*together"):
        plan(llama, ignore=("re:.*q_proj",))
    with pytest.raises(InputError, match=r"gate_proj and .*up_proj must be quantized alike"):
        plan(llama, overrides={"re:.*up_proj": {"weight_bits": 8}})


@pytest.mark.parametrize("field", ["ignore", "overrides"])
def test_a_pattern_that_matches_nothing_is_a_mistake(llama: Path, field: str) -> None:
    pattern = "re:layers"
    given = (pattern,) if field == "ignore" else {pattern: {"weight_bits": 8}}
    with pytest.raises(InputError, match=r"'re:layers' matches no linear .* model\.layers\.0\."):
        plan(llama, **{field: given})


@pytest.mark.parametrize(
    ("pattern", "fields", "message"),
    [
        ("lm_head", {"weight_bits": 4}, "only --head-bits quantizes"),
        ("re:.*down_proj", {"weight_bits": 8}, "what --ignore leaves in 16 bits"),
        ("re:.*o_proj", {"static_bits": 8}, "sets static_bits, but none .* static activations"),
        ("re:.*o_proj", {"activations": "static"}, "sets activations, but none .* static"),
        ("re:.*(gate|up)_proj", {"dynamic_bits": 8}, "sets dynamic_bits, but none .* per-token"),
    ],
)
def test_an_override_that_changes_nothing_is_a_mistake(
    llama: Path, pattern: str, fields: dict[str, JsonValue], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        plan(llama, head_bits=8, ignore=("re:.*down_proj",), overrides={pattern: fields})


def test_an_override_of_everything_is_for_those_whom_it_concerns(llama: Path) -> None:
    fields = {"static_bits": 8, "dynamic_bits": 8}
    made = plan(llama, head_bits=8, overrides={"re:.*": fields})
    assert made.checkpoint.quantized["model.layers.0.mlp.up_proj"].input.bits == 8


def test_an_ignored_head_stays_tied(tmp_path: Path) -> None:
    source = make_model(tmp_path / "tied", "llama", tied=True)
    reader, _, _ = open_model(source, SMALL.model_copy(update={"head_bits": 8}))
    assert not reader.config["tie_word_embeddings"]
    options = SMALL.model_copy(update={"head_bits": 8, "ignore": ("lm_head",)})
    reader, _, _ = open_model(source, options)
    assert reader.config["tie_word_embeddings"]
    made = make_plan(find("llama"), reader.config, options.model_copy(update={"alpha": 0.0}), "")
    assert "lm_head" not in made.checkpoint.quantized


def test_it_is_refused_before_a_weight_is_read(tmp_path: Path, llama: Path, text: Path) -> None:
    options = SMALL.model_copy(update={"segments": 3})  # 64 channels are two runs of 32
    with pytest.raises(InputError, match=r"--segments 3 is too much for 64 columns"):
        quantize(llama, tmp_path / "out", [text], options, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": {"re:(": {"weight_bits": 8}}}, "is no regular expression"),
        ({"overrides": {"re:.*": {"rotation": "online"}}}, "'rotation' cannot differ"),
        ({"overrides": {"re:.*": {"weight_bits": 5}}}, r"for 're:.*', weight_bits"),
        ({"segments": 2, "group_size": 32}, "groups or segments, not both"),
        ({"mix_heads": 2, "rotation": "none"}, "mix_heads is done by the server"),
        ({"ignore": ("",)}, "a pattern is a module's name"),
    ],
)
def test_options_that_contradict_themselves_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options.model_validate(changes)


def test_overrides_are_spelled_in_one_line_of_a_shell() -> None:
    spelled = ["weight_bits=8,static-bits=8@re:.*(gate|up)_proj", "asymmetric=true@lm_head"]
    flags = {**SMALL.model_dump(), "overrides": spelled}
    assert read_options(flags).overrides == {
        "re:.*(gate|up)_proj": {"weight_bits": 8, "static_bits": 8},
        "lm_head": {"asymmetric": True},
    }
    for wrong in ("weight_bits=8", "weight_bits@x", "@x", "=8@x"):
        with pytest.raises(InputError, match=r"--override .* is not understood"):
            read_options({**flags, "overrides": [wrong]})


def test_the_command_makes_what_its_flags_say(tmp_path: Path, llama: Path, text: Path) -> None:
    command = ["quantize", str(llama), str(tmp_path / "out"), "--calibration", str(text), "--quiet"]
    command += ["--fast", "--statistics-samples", "2", "--gptq-samples", "2"]
    command += ["--sequence-length", "64", "--reconstruction", "none"]
    command += [
        "--ignore",
        "model.layers.0.mlp.down_proj",
        "--override",
        f"weight_bits=8@{GATE_UP}",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    quantized = parse(config).quantized
    assert "model.layers.0.mlp.down_proj" not in quantized
    assert quantized["model.layers.1.mlp.up_proj"].weight.bits == 8
    inspected = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert "not quantized: model.layers.0.mlp.down_proj\n" in inspected.output

"""The contract refuses what it does not know, and names it."""

import json
from pathlib import Path
from typing import Any

import pytest

from mergequant.model.reader import Reader
from mergequant_vllm.format import (
    CheckpointFormat,
    FormatError,
    LinearForm,
    StoredTensor,
    WeightForm,
    check_tensors,
    expected_tensors,
    matches,
    parse,
    shortest_targets,
    stored_tensors,
)
from tests.forms import linear_form


@pytest.fixture
def config(checkpoint: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    quantization: dict[str, Any] = loaded["quantization_config"]
    return quantization


@pytest.fixture
def contract(config: dict[str, Any]) -> CheckpointFormat:
    return parse(config)


def test_what_is_written_is_what_is_expected(checkpoint: Path, contract: CheckpointFormat) -> None:
    stored = Reader(checkpoint).headers
    check_tensors(contract, stored)
    assert stored.keys() == expected_tensors(contract).keys()


def test_the_contract_survives_json(config: dict[str, Any], contract: CheckpointFormat) -> None:
    assert json.loads(contract.model_dump_json()) == config


@pytest.mark.parametrize("version", [0, 1, 3, None, "2"])
def test_other_versions_are_refused_by_name(config: dict[str, Any], version: object) -> None:
    with pytest.raises(FormatError, match=f"format version {version!r}; this .* reads version 2"):
        parse({**config, "format_version": version})


def test_format_1_is_to_be_quantized_again(config: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=r"version 1; .* reads version 2: quantize again\.$"):
        parse({**config, "format_version": 1, "outer": {}})


def test_other_methods_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="quant_method 'gptq', not 'mergequant'"):
        parse({**config, "quant_method": "gptq"})


def test_extra_fields_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="field 'group_size' is wrong"):
        parse({**config, "group_size": 128})
    config["targets"][0]["linear"]["weight"]["zero_point"] = True
    with pytest.raises(FormatError, match=r"field 'targets.0.linear.weight.zero_point' is wrong"):
        parse(config)


def test_missing_extra_misshapen_and_mistyped_tensors_are_named(
    contract: CheckpointFormat,
) -> None:
    whole = expected_tensors(contract)
    name = "model.layers.1.self_attn.k_proj.weight_packed"
    without = {key: value for key, value in whole.items() if key != name}
    with pytest.raises(FormatError, match=f"'{name}' is missing"):
        check_tensors(contract, without)
    with pytest.raises(FormatError, match=r"'lm_head.bias' does not belong"):
        check_tensors(contract, {**whole, "lm_head.bias": StoredTensor((3,), "BF16")})
    with pytest.raises(FormatError, match=rf"'{name}' has shape \[32, 9\], not \[32, 8\]"):
        check_tensors(contract, {**whole, name: StoredTensor((32, 9), "I32")})
    with pytest.raises(FormatError, match=f"'{name}' has dtype F32, not I32"):
        check_tensors(contract, {**whole, name: StoredTensor(whole[name].shape, "F32")})


def test_every_stored_form_has_its_tensors() -> None:
    static = {"columns": 256, "offsets": True, "bias": True, "input_zero_points": True}
    weight = {"weight_bits": 3, "group_size": 64, "zero_points": True}
    whole = linear_form((64, 172), "static", output_offset="bfloat16", **static, **weight)
    assert stored_tensors(whole) == {
        "weight_packed": StoredTensor((64, 24), "I32"),
        "weight_scale": StoredTensor((64, 4), "BF16"),
        "weight_zero_point": StoredTensor((64, 4), "I8"),
        "bias": StoredTensor((64,), None),
        "output_offset": StoredTensor((64,), "BF16"),
        "input_index": StoredTensor((256,), "I32"),
        "input_offset": StoredTensor((256,), "F32"),
    }
    dynamic = linear_form((64, 172), "dynamic", weight_bits=8, hadamard=4, heads=(2, 43))
    assert stored_tensors(dynamic) == {
        "weight_packed": StoredTensor((64, 43), "I32"),
        "weight_scale": StoredTensor((64, 1), "BF16"),
        "input_clip": StoredTensor((1,), "F32"),
    }
    segments = linear_form((64, 172), "dynamic", segments=(96, 64, 12), output_offset="float32")
    assert stored_tensors(segments)["weight_scale"] == StoredTensor((64, 3), "BF16")
    assert stored_tensors(segments)["output_offset"] == StoredTensor((64,), "F32")


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            "static",
            {"norm": None, "columns": 180},
            "without a norm has neither columns nor offsets",
        ),
        ("static", {"norm": None, "offsets": True}, "without a norm has neither columns nor off"),
        ("static", {"input_zero_points": True}, "zero points of a static input are stored as off"),
        ("dynamic", {"hadamard": 6}, "hadamard block 6 is no power of two"),
        ("dynamic", {"hadamard": 8}, "hadamard block 8 must divide 172 input channels"),
        ("dynamic", {"heads": (3, 32)}, "run of heads 96 must divide 172 input channels"),
        ("dynamic", {"heads": (1, 172)}, "are no heads to be mixed"),
        ("static", {"group_size": 40}, "multiple of 32"),
        ("static", {"segments": (64, 108), "group_size": 32}, "groups or segments, not both"),
        ("static", {"segments": (60, 112)}, "segments but the last are multiples of 32"),
        ("static", {"segments": (64, 64)}, "add up to 128, not to the 172 columns"),
        ("static", {"weight_bits": 5}, "bits"),
        ("dynamic", {"activation_bits": 3}, "bits"),
    ],
)
def test_forms_that_contradict_themselves_are_refused(kind: str, fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_form((64, 172), kind, **fields)


UP = "model.layers.1.mlp.up_proj"
GATE = "model.layers.1.mlp.gate_proj"


def changed(config: dict[str, Any], pattern: str, **weight: Any) -> dict[str, Any]:
    """The configuration with one more target, whose weights differ from the first's."""
    linear = json.loads(json.dumps(config["targets"][0]["linear"]))
    linear["weight"].update(weight)
    return {**config, "targets": [*config["targets"], {"pattern": pattern, "linear": linear}]}


def test_later_targets_override_earlier_ones(config: dict[str, Any]) -> None:
    both = r"re:model\.layers\.1\.mlp\.(gate|up)_proj$"
    contract = parse(changed(config, both, bits=8))
    assert contract.quantized[UP].weight.bits == 8 == contract.quantized[GATE].weight.bits
    assert contract.quantized["model.layers.0.mlp.up_proj"].weight.bits == 4
    again = parse(changed(changed(config, both, bits=8), UP, bits=3))
    assert (again.quantized[UP].weight.bits, again.quantized[GATE].weight.bits) == (3, 8)


def test_what_no_target_matches_is_not_quantized(config: dict[str, Any]) -> None:
    left = {"pattern": UP, "linear": None}
    contract = parse({**config, "targets": [*config["targets"], left]})
    assert UP not in contract.quantized and GATE in contract.quantized
    expected = expected_tensors(contract)
    assert expected[f"{UP}.weight"] == StoredTensor((172, 64), None)
    assert f"{UP}.weight_packed" not in expected


def test_a_target_that_matches_nothing_is_a_mistake(config: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=r"'re:model\.layer\.9' matches no linear"):
        parse(changed(config, "re:model.layer.9", bits=8))
    with pytest.raises(FormatError, match="is no regular expression"):
        parse(changed(config, "re:(", bits=8))


def test_readers_of_one_norm_read_it_alike(config: dict[str, Any]) -> None:
    different = changed(config, UP)
    different["targets"][-1]["linear"]["input"]["bits"] = 8
    with pytest.raises(FormatError, match=r"gate_proj and .*up_proj read .* in different ways"):
        parse(different)


def test_targets_are_written_as_few_as_the_model_allows(config: dict[str, Any]) -> None:
    assert len(config["targets"]) == 3  # norm-fed linears, o and down, the head
    contract = parse(config)
    usual = {x: _form(contract, x) for x in contract.quantized}
    roles = {x: x.replace(".0.", ".{block}.").replace(".1.", ".{block}.") for x in usual}
    other = usual[UP].model_copy(update={"weight": WeightForm(bits=8)})
    targets = shortest_targets({**usual, UP: other, GATE: other}, roles)
    assert len(targets) == 4
    quantized = parse({**config, "targets": [x.model_dump(mode="json") for x in targets]}).quantized
    for name, linear in contract.quantized.items():
        assert quantized[name].weight.bits == (8 if name in (UP, GATE) else linear.weight.bits)
    ignored = shortest_targets({**usual, UP: None, GATE: None}, roles)
    assert ignored[-1].linear is None and matches(ignored[-1].pattern, UP)


def _form(contract: CheckpointFormat, name: str) -> LinearForm:
    linear = contract.quantized[name]
    return LinearForm(weight=linear.weight, input=linear.input, output_offset=linear.output_offset)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        (UP, UP, True),
        (UP, f"{UP}x", False),
        ("re:.*up_proj", UP, True),
        ("re:mlp", UP, False),  # from the beginning, as compressed-tensors matches
        (r"re:model\.layers\.1", UP.replace("1", "11"), True),
        (r"re:model\.layers\.1\.", UP.replace("1", "11"), False),
    ],
)
def test_patterns_match_as_in_compressed_tensors(pattern: str, name: str, expected: bool) -> None:
    from compressed_tensors.utils.match import match_name

    assert matches(pattern, name) == expected == match_name(name, pattern)

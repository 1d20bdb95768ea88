"""The contract refuses what it does not know, and names it."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from mergequant.model.reader import Reader
from mergequant_vllm.format import (
    CheckpointFormat,
    FormatError,
    LinearFormat,
    StoredTensor,
    check_tensors,
    expected_tensors,
    parse,
    stored_tensors,
)


@pytest.fixture
def config(checkpoint: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    quantization: dict[str, Any] = loaded["quantization_config"]
    return quantization


@pytest.fixture
def contract(config: dict[str, Any]) -> CheckpointFormat:
    return parse(config)


def test_what_is_written_is_what_is_expected(checkpoint: Path, contract: CheckpointFormat) -> None:
    stored = Reader(checkpoint).stored
    check_tensors(contract, stored)
    assert stored.keys() == expected_tensors(contract).keys()


def test_the_contract_survives_json(config: dict[str, Any], contract: CheckpointFormat) -> None:
    assert json.loads(contract.model_dump_json()) == config


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_other_versions_are_refused_by_name(config: dict[str, Any], version: object) -> None:
    with pytest.raises(FormatError, match=f"format version {version!r}; this .* reads version 1"):
        parse({**config, "format_version": version})


def test_other_methods_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="quant_method 'gptq', not 'mergequant'"):
        parse({**config, "quant_method": "gptq"})


def test_extra_fields_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="field 'group_size' is wrong"):
        parse({**config, "group_size": 128})
    config["linears"]["mlp.up_proj"]["zero_point"] = True
    with pytest.raises(FormatError, match=r"field 'linears.mlp.up_proj.zero_point' is wrong"):
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


def linear(**fields: Any) -> LinearFormat:
    static: dict[str, Any] = {"activations": "static", "norm": "input_layernorm"}
    dynamic: dict[str, Any] = {"activations": "dynamic"}
    kind = dynamic if fields.get("activations") == "dynamic" else static
    return LinearFormat.model_validate({"shape": (64, 172), **kind, **fields})


def test_every_stored_form_has_its_tensors() -> None:
    whole = stored_tensors(
        linear(weight_bits=3, group_size=64, zero_points=True, columns=256, offsets=True, bias=True)
    )
    assert whole == {
        "weight_packed": StoredTensor((64, 24), "I32"),
        "weight_scale": StoredTensor((64, 4), "BF16"),
        "weight_zero_point": StoredTensor((64, 4), "I8"),
        "bias": StoredTensor((64,), None),
        "input_index": StoredTensor((256,), "I32"),
        "input_offset": StoredTensor((256,), "F32"),
    }
    assert stored_tensors(linear(weight_bits=8, activations="dynamic", hadamard=4)) == {
        "weight_packed": StoredTensor((64, 43), "I32"),
        "weight_scale": StoredTensor((64, 1), "BF16"),
        "input_clip": StoredTensor((1,), "F32"),
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": None}, "static activations name their norm"),
        ({"activations": "dynamic", "norm": "n"}, "dynamic ones have none"),
        ({"activations": "dynamic", "columns": 172}, "reconstruction .* is for static"),
        ({"activations": "dynamic", "offsets": True}, "reconstruction .* is for static"),
        ({"hadamard": 4}, "the online rotation .* is for dynamic"),
        ({"activations": "dynamic", "hadamard": 6}, "hadamard block 6 must be a power of two"),
        ({"activations": "dynamic", "hadamard": 8}, "that divides 172 input channels"),
        ({"group_size": 40}, "group_size must be a multiple of 32"),
        ({"weight_bits": 5}, "weight_bits"),
        ({"activation_bits": 3}, "activation_bits"),
    ],
)
def test_forms_that_contradict_themselves_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        linear(**fields)

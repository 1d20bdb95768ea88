"""Hashes that unfinished runs and kept rows are recognised by: they may not change."""

import hashlib
from pathlib import Path

import pytest
import torch
import transformers

import mergequant_vllm
from mergequant.output.fingerprint import (
    config_sha256,
    library_versions,
    versions_of,
    weights_sha256,
)

# sha256 of '{"a": [1, 2], "b": null}'
OF_A_AND_B = "14265913f60ea6d8fd54c743c5beb66818c144bfe337a19ea9782429eed31287"


@pytest.mark.parametrize("config", [{"a": [1, 2], "b": None}, {"b": None, "a": [1, 2]}])
def test_a_config_is_known_by_what_it_says(config: dict[str, object]) -> None:
    assert config_sha256(config) == OF_A_AND_B
    assert config_sha256({**config, "b": 0}) != OF_A_AND_B


def test_each_weight_file_has_its_own_hash(tmp_path: Path) -> None:
    contents = {f"model-{i}.safetensors": bytes([i]) * (i * 1000) for i in range(7)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = [tmp_path / name for name in contents]
    hashes = weights_sha256(files)
    assert hashes == {name: hashlib.sha256(x).hexdigest() for name, x in contents.items()}
    assert list(hashes) == list(contents)
    files[3].write_bytes(contents[files[3].name][:-1] + b"\0")
    again = weights_sha256(files)
    assert [name for name in hashes if hashes[name] != again[name]] == [files[3].name]


def test_versions_are_of_this_release_and_of_what_was_named() -> None:
    own = {"mergequant-vllm": mergequant_vllm.__version__}
    assert versions_of() == own
    assert versions_of("torch") == {**own, "torch": torch.__version__}
    assert library_versions()["transformers"] == transformers.__version__

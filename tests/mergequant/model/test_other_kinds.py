"""Models of other kinds are refused with the command that converts them, which is Python."""

import ast
import json
import re
from pathlib import Path

import pytest

from mergequant.errors import InputError
from mergequant.model.reader import Reader
from tests.tiny import make_model

KINDS = {
    "adapter": ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "LoRA adapter"),
    "gguf": ({"config.json": "{}", "model-q4.gguf": ""}, "GGUF model"),
    "pickle": ({"config.json": "{}", "pytorch_model.bin": ""}, "pickled weights"),
    "pth": ({"consolidated.00.pth": ""}, "pickled weights"),
    "multimodal": (
        {"config.json": '{"model_type": "llava", "text_config": {}}', "model.safetensors": ""},
        r"multimodal model \(llava\)",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_refused_with_its_command(tmp_path: Path, kind: str) -> None:
    files, name = KINDS[kind]
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=name) as caught:
        Reader(tmp_path)
    for program in re.findall(r'python -c "([^"]*)"', str(caught.value)) or [""]:
        ast.parse(program)
        # No command takes the language model out of every multimodal one.
        assert (kind == "multimodal") != (str(tmp_path) in program and "save_pretrained" in program)


def test_an_adapter_beside_its_model_is_no_reason(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    (model / "adapter_config.json").write_text("{}")
    (model / "training_args.bin").write_text("")
    assert Reader(model).config == json.loads((model / "config.json").read_text())


def test_an_empty_folder_is_still_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no safetensors weights"):
        Reader(tmp_path)

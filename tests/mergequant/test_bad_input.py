"""Bad input on the command line: one sentence, exit status 1, nothing half-written."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergequant import InputError, cli
from mergequant.model.reader import at_revision

Change = Callable[[Path], None]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> str:
    """Run the command; it must fail, and its one sentence is returned."""
    monkeypatch.setattr(sys, "argv", ["mergequant", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    message = str(stop.value.code)
    assert message.startswith("mergequant: ") and message.endswith(".")
    assert "\n" not in message
    return message


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensor(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lose_a_shard(folder: Path) -> None:
    weight_map = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def poison(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = load_file(folder / "model.safetensors")[name]
    tensor[0, 0] = torch.nan
    edit_tensor(folder, name, tensor)


MODEL_FAULTS: dict[str, tuple[Change, str]] = {
    "not a model": (lambda x: (x / "config.json").unlink(), "holds no config.json"),
    "broken config": (lambda x: (x / "config.json").write_text("{") and None, "is not JSON"),
    "no weights": (lambda x: (x / "model.safetensors").unlink(), "no safetensors weights"),
    "no tokenizer": (lambda x: (x / "tokenizer.json").unlink(), "has no tokenizer"),
    "unknown architecture": (lambda x: edit_config(x, model_type="gpt2"), "'gpt2' is unknown"),
    "quantized already": (
        lambda x: edit_config(x, quantization_config={"quant_method": "awq"}),
        "quantized already (quant_method 'awq')",
    ),
    "truncated shard": (truncate, "cannot be read"),
    "missing shard": (lose_a_shard, "model-00002-of-00002.safetensors is missing"),
    "broken index": (
        lambda x: (x / "model.safetensors.index.json").write_text("{}") and None,
        "is not an index of shards",
    ),
    "incomplete config": (
        lambda x: edit_config(x, intermediate_size=None),
        "config.json (Field 'intermediate_size' expected int",
    ),
    "nan": (poison, "'model.layers.1.mlp.up_proj.weight' of"),
    "missing tensor": (
        lambda x: edit_tensor(x, "model.layers.0.mlp.down_proj.weight", None),
        "'model.layers.0.mlp.down_proj.weight' of architecture 'llama' is not in",
    ),
    "another shape": (lambda x: edit_config(x, intermediate_size=128), "config.json makes it"),
}


@pytest.mark.parametrize("fault", sorted(MODEL_FAULTS))
def test_a_bad_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama: Path, text: Path, fault: str
) -> None:
    change, expected = MODEL_FAULTS[fault]
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    change(model)
    message = run(monkeypatch, "quantize", model, tmp_path / "out", "--calibration", text)
    assert expected in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_missing_folder_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: Path
) -> None:
    missing = tmp_path / "nowhere"
    message = run(monkeypatch, "quantize", missing, tmp_path / "out", "--calibration", text)
    assert f"'{missing}' does not exist" in message
    message = run(monkeypatch, "quantize", text, tmp_path / "out", "--calibration", text)
    assert "is a file: give the model's folder" in message


def test_a_quantized_model_is_not_quantized_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Path, text: Path
) -> None:
    message = run(monkeypatch, "quantize", checkpoint, tmp_path / "out", "--calibration", text)
    assert "quantized already (quant_method 'mergequant')" in message


@pytest.mark.parametrize(
    ("content", "expected"), [("", "is empty"), ("too short", "fewer than 16")]
)
def test_bad_calibration_text_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama: Path, content: str, expected: str
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(content)
    message = run(monkeypatch, "quantize", llama, tmp_path / "out", "--calibration", file)
    assert expected in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_an_output_folder_in_use_is_refused_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama: Path, text: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    message = run(monkeypatch, "quantize", llama, tmp_path / "out", "--calibration", text)
    assert "is not empty" in message
    assert (tmp_path / "out" / "mine").read_text() == "keep"


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--weights", "awq", "--weights is wrong"),
        ("--damping", "0", "--damping is wrong"),
        ("--alpha", "high", " or Input should be 'architecture' or 'auto'"),
        ("--device", "cuda:99", "Device 'cuda:99' cannot be used here"),
    ],
)
def test_bad_options_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    llama: Path,
    text: Path,
    option: str,
    value: str,
    expected: str,
) -> None:
    arguments = ("quantize", llama, tmp_path / "out", "--calibration", text, option, value)
    assert expected in run(monkeypatch, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_perplexity_and_inspect_refuse_what_they_cannot_read(
    monkeypatch: pytest.MonkeyPatch, llama: Path, text: Path
) -> None:
    assert "choose one of vllm, transformers" in run(
        monkeypatch, "perplexity", llama, "--text", text, "--engine", "onnx"
    )
    assert "is not a mergequant checkpoint" in run(monkeypatch, "inspect", llama)
    assert "does not exist" in run(monkeypatch, "perplexity", llama, "--text", "none.txt")
    for option in ("--window", "--windows"):
        assert "raise --window" in run(
            monkeypatch, "perplexity", llama, "--text", text, option, "0"
        )


def test_a_damaged_checkpoint_is_refused_before_an_engine_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Path, text: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "is missing: download" in run(monkeypatch, "perplexity", folder, "--text", text)
    (folder / "model.safetensors.index.json").unlink()
    for shard in folder.glob("*.safetensors"):  # else their names say how many there must be
        shard.rename(folder / f"part-{shard.name[6:11]}.safetensors")
    message = run(monkeypatch, "perplexity", folder, "--text", text)
    assert "is missing (" in message and "quantize the model again" in message


@pytest.mark.parametrize(
    ("model", "revision", "expected"),
    [("org/name", None, "org/name"), ("org/name", "v1", "org/name@v1")],
)
def test_a_revision_is_of_a_hub_id(model: str, revision: str | None, expected: str) -> None:
    assert at_revision(model, revision) == expected


def test_a_revision_of_a_folder_or_a_second_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is of hub ids"):
        at_revision(str(tmp_path), "v1")
    with pytest.raises(InputError, match="give the revision once"):
        at_revision("org/name@v2", "v1")

"""The quantizer as a whole, on small models of every architecture."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mergequant import Options, quantize
from mergequant.evaluate.perplexity import reference_logits
from mergequant.evaluate.reference_forward import load_model
from mergequant.model.architectures import ARCHITECTURES
from mergequant.model.reader import Reader
from mergequant.output.writer import Writer
from mergequant_vllm.format import check_tensors, parse
from tests.conftest import SMALL
from tests.tiny import make_model

WINDOW = torch.arange(2, 66)[None]


def digest(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.glob("*.safetensors")
    }


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize("tied", [False, True])
def test_every_architecture_is_quantized_and_still_the_same_model(
    tmp_path: Path, text: Path, model_type: str, tied: bool
) -> None:
    source = make_model(tmp_path / "source", model_type, tied=tied, dtype=torch.bfloat16)
    output = quantize(source, tmp_path / "out", [text], SMALL, progress=False)
    reader = Reader(output)
    check_tensors(parse(reader.config["quantization_config"]), reader.headers)
    full = reference_logits(load_model(source), WINDOW).flatten(0, 1)
    ours = reference_logits(load_model(output), WINDOW).flatten(0, 1)
    likeness = torch.cosine_similarity(full, ours, dim=-1)
    # Random weights are the worst case; an error of naming or of order gives about 0. A step per
    # token for every linear, where no norm stands in front, costs more.
    static = any(x.norm is not None for x in ARCHITECTURES[model_type].readers())
    assert float(likeness.mean()) > (0.9 if static else 0.8)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "gemma2", "stablelm", "opt"])
def test_steps_that_v_and_up_carry_leave_the_same_model(
    tmp_path: Path, text: Path, model_type: str
) -> None:
    source = make_model(tmp_path / "source", model_type, dtype=torch.bfloat16)
    fields = {"activations": "fully_static", "static_bits": 8, "weight_bits": 8}
    options = SMALL.model_copy(update={**fields, "dynamic_bits": 8})
    output = quantize(source, tmp_path / "out", [text], options, progress=False)
    contract = parse(Reader(output).config["quantization_config"])
    gated = any("mlp_up" in x.written for x in ARCHITECTURES[model_type].linears)
    block = contract.block_linears(0).items()
    dynamic = [name for name, linear in block if linear.static is None]
    assert dynamic == ([] if gated else ["fc2"])  # an activation function is in its way
    groups = {name: x.weight.group_size for name, x in contract.block_linears(0).items()}
    assert {k: v for k, v in groups.items() if v} == ({"mlp.down_proj": 64} if gated else {})
    full = reference_logits(load_model(source), WINDOW).flatten(0, 1)
    ours = reference_logits(load_model(output), WINDOW).flatten(0, 1)
    # The window's tokens are others than the text's, which steps that do not look at them clip.
    assert float(torch.cosine_similarity(full, ours, dim=-1).mean()) > 0.95


def test_a_seed_gives_the_same_bytes(tmp_path: Path, llama: Path, text: Path) -> None:
    first = quantize(llama, tmp_path / "a", [text], SMALL, progress=False)
    second = quantize(llama, tmp_path / "b", [text], SMALL, progress=False)
    assert digest(first) == digest(second)
    assert (first / "config.json").read_text() == (second / "config.json").read_text()
    other = SMALL.model_copy(update={"seed": 1})
    assert digest(first) != digest(quantize(llama, tmp_path / "c", [text], other, progress=False))


def test_stored_steps_are_the_same_numbers_in_every_model_dtype(checkpoint: Path) -> None:
    reader = Reader(checkpoint)
    folded = [name for name in reader.headers if "layernorm" in name]
    scales = [name for name in reader.headers if name.endswith("weight_scale")]
    assert len(folded) == 4 and len(scales) == 15
    for name in folded + scales:
        stored = reader.read(name).to(torch.float64)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert torch.equal(stored.to(dtype).to(torch.float64), stored), name


def test_the_report_has_a_line_for_each_linear(checkpoint: Path) -> None:
    lines = (checkpoint / "quantization_report.jsonl").read_text().splitlines()
    entries = {entry["linear"]: entry for entry in map(json.loads, lines)}
    assert len(entries) == len(lines) == 14
    for name, entry in entries.items():
        assert 0 < entry["loss_gptq"] < entry["loss_rtn"] < 0.1, name
        assert entry["damping"] == 0.01 and min(entry["seconds"].values()) >= 0
    assert entries["model.layers.0.mlp.down_proj"]["activations"] == "dynamic"
    assert 0.4 <= entries["model.layers.0.mlp.down_proj"]["clip"] <= 1
    assert entries["model.layers.0.mlp.up_proj"]["activations"] == "static"


def test_what_made_the_checkpoint_is_stored_with_it(checkpoint: Path, llama: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    contract = parse(config["quantization_config"])
    assert contract.provenance.options["gptq_samples"] == 8
    assert contract.provenance.versions["torch"] == torch.__version__
    assert len(contract.provenance.calibration_sha256) == 64
    source = json.loads((llama / "config.json").read_text())
    assert {key: config[key] for key in source} == source
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (checkpoint / name).read_bytes() == (llama / name).read_bytes()


def test_files_can_be_read_by_others(checkpoint: Path) -> None:
    for file in checkpoint.iterdir():
        assert file.stat().st_mode & 0o444 == (checkpoint / "config.json").stat().st_mode & 0o444


@pytest.mark.parametrize("clipping", ["none", "channel"])
@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_the_ablations_options_take_effect(
    tmp_path: Path, llama: Path, text: Path, clipping: str, activations: str
) -> None:
    changes = {"clipping": clipping, "activations": activations, "weights": "rtn"}
    options = Options.model_validate({**SMALL.model_dump(), **changes})
    output = quantize(llama, tmp_path / "out", [text], options, progress=False)
    lines = (output / "quantization_report.jsonl").read_text().splitlines()
    for entry in map(json.loads, lines):
        assert entry["loss_gptq"] is None
        if entry["linear"].endswith(("o_proj", "down_proj")) or activations == "dynamic":
            assert entry["activations"] == "dynamic" and entry["clip"] == 1.0
        else:
            assert (entry["clip"]["lowest"] < 1.0) == (clipping == "channel")


def test_sharded_and_half_precision_sources_are_read(
    tmp_path: Path, llama: Path, checkpoint: Path, text: Path
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    sharded = tmp_path / "sharded"
    shutil.copytree(llama, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    again = quantize(sharded, tmp_path / "again", [text], SMALL, progress=False)
    assert digest(again) == digest(checkpoint)
    half = make_model(tmp_path / "half", dtype=torch.float16)
    output = quantize(half, tmp_path / "half-out", [text], SMALL, progress=False)
    norm = Reader(output).read("model.layers.0.input_layernorm.weight")
    assert norm.dtype == torch.float16 and norm.gt(0).all()


def test_gptq_may_use_fewer_windows_than_the_statistics(
    tmp_path: Path, llama: Path, text: Path
) -> None:
    few = SMALL.model_copy(update={"statistics_samples": 8, "gptq_samples": 2})
    many = SMALL.model_copy(update={"statistics_samples": 8, "gptq_samples": 8})
    folders = [
        quantize(llama, tmp_path / str(number), [text], options, progress=False)
        for number, options in enumerate((few, many))
    ]
    norms = [Reader(x).read("model.layers.0.input_layernorm.weight") for x in folders]
    codes = [Reader(x).read("model.layers.0.mlp.up_proj.weight_packed") for x in folders]
    assert torch.equal(*norms)
    assert not torch.equal(*codes)


def test_the_output_may_be_a_mount_a_link_or_left_over_from_a_run_that_finished_nothing(
    tmp_path: Path, llama: Path, text: Path
) -> None:
    (tmp_path / "real" / ".partial").mkdir(parents=True)
    (tmp_path / "real" / ".partial" / "model-00001-of-00003.safetensors").write_text("half")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    output = quantize(llama, tmp_path / "link", [text], SMALL, progress=False)
    assert (tmp_path / "link").is_symlink()
    assert not (output / ".partial").exists()
    check_tensors(parse(Reader(output).config["quantization_config"]), Reader(output).headers)


def test_a_run_interrupted_before_its_first_block_is_finished_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama: Path, text: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "write_block", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(llama, tmp_path / "a" / "b", [text], SMALL, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_reference_splits_row_parallel_inputs(checkpoint: Path) -> None:
    one = reference_logits(load_model(checkpoint), WINDOW)
    two = reference_logits(load_model(checkpoint, tensor_parallel_size=2), WINDOW)
    assert not torch.equal(one, two)
    assert float(torch.cosine_similarity(one.flatten(), two.flatten(), dim=0)) > 0.9

"""The plugin inside vLLM's own classes, without an engine: loading, refusals, arithmetic."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergequant import quantize
from mergequant.evaluate.reference_forward import load_model
from mergequant_vllm.format import FormatError
from tests.conftest import FEW, SMALL
from tests.forms import linear_form
from tests.tiny import make_model, write_text

pytest.importorskip("vllm")

from vllm.config import (
    LoRAConfig,
    VllmConfig,
    get_current_vllm_config,
    set_current_vllm_config,
)
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from mergequant_vllm.compile_cache import SWITCH
from mergequant_vllm.config import MergeQuantConfig
from mergequant_vllm.embedding import LookupMethod
from mergequant_vllm.linear import MergeQuantLinearMethod, record_in_compile_cache_key

BLOCK = "model.layers.0"


def plugin_config(folder: Path) -> MergeQuantConfig:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    plugin = MergeQuantConfig.from_config(config)
    plugin.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return plugin


def load_parts(layer: torch.nn.Module, folder: Path, names: dict[str, Any]) -> None:
    """Load the checkpoint's linears `names` (name -> vLLM's shard id) as vLLM's models do."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
    parameters = dict(layer.named_parameters())
    for name, shard in names.items():
        for suffix, parameter in parameters.items():
            stored = tensors[f"{BLOCK}.{name}.{suffix}"]
            arguments = () if shard is None else (shard,)
            parameter.weight_loader(parameter, stored, *arguments)
    layer.quant_method.process_weights_after_loading(layer)


def run(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


def reference_outputs(folder: Path, names: list[str], x: torch.Tensor) -> torch.Tensor:
    model = load_model(folder)
    return torch.cat([model.get_submodule(f"{BLOCK}.{name}")(x) for name in names], dim=-1)


@pytest.mark.usefixtures("_ranks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_linears_equal_the_reference(checkpoint: Path, dtype: torch.dtype) -> None:
    plugin = plugin_config(checkpoint)
    x = (3 * torch.randn(9, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    qkv = QKVParallelLinear(
        64, 32, 2, 1, bias=False, params_dtype=dtype, quant_config=plugin,
        prefix=f"{BLOCK}.self_attn.qkv_proj",
    )  # fmt: skip
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    load_parts(qkv, checkpoint, dict(zip(names, "qkv", strict=True)))
    assert torch.equal(run(qkv, x), reference_outputs(checkpoint, names, x))
    gate_up = MergedColumnParallelLinear(
        64, [172, 172], bias=False, params_dtype=dtype, quant_config=plugin,
        prefix=f"{BLOCK}.mlp.gate_up_proj",
    )  # fmt: skip
    load_parts(gate_up, checkpoint, {"mlp.gate_proj": 0, "mlp.up_proj": 1})
    expected = reference_outputs(checkpoint, ["mlp.gate_proj", "mlp.up_proj"], x)
    assert torch.equal(run(gate_up, x), expected)


@pytest.mark.usefixtures("_ranks")
def test_biases_are_loaded_and_added_after_scaling(tmp_path: Path, text: Path) -> None:
    source = make_model(tmp_path / "qwen2", "qwen2", blocks=1)
    folder = quantize(source, tmp_path / "out", [text], SMALL, progress=False)
    qkv = QKVParallelLinear(
        64, 32, 2, 1, bias=True, params_dtype=torch.float32, quant_config=plugin_config(folder),
        prefix=f"{BLOCK}.self_attn.qkv_proj",
    )  # fmt: skip
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    load_parts(qkv, folder, dict(zip(names, "qkv", strict=True)))
    x = 3 * torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    expected = reference_outputs(folder, names, x)
    assert torch.equal(run(qkv, x), expected)
    assert not torch.equal(run(qkv, x), expected - qkv.bias)


@pytest.mark.usefixtures("_ranks")
def test_merged_per_token_linears_equal_the_reference_and_must_share_their_clip(
    tmp_path: Path, llama: Path, text: Path
) -> None:
    options = SMALL.model_copy(update={"activations": "dynamic"})
    folder = quantize(llama, tmp_path / "out", [text], options, progress=False)
    parts: dict[str, Any] = {"mlp.gate_proj": 0, "mlp.up_proj": 1}
    sizes: dict[str, Any] = {"bias": False, "params_dtype": torch.float32}
    sizes |= {"quant_config": plugin_config(folder), "prefix": f"{BLOCK}.mlp.gate_up_proj"}
    layer = MergedColumnParallelLinear(64, [172, 172], **sizes)
    load_parts(layer, folder, parts)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(layer, x), reference_outputs(folder, list(parts), x))
    file = folder / "model-00001-of-00003.safetensors"
    tensors = load_file(file)
    tensors[f"{BLOCK}.mlp.up_proj.input_clip"] *= 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match="have different clip ratios"):
        load_parts(MergedColumnParallelLinear(64, [172, 172], **sizes), folder, parts)


@pytest.mark.usefixtures("_ranks")
@pytest.mark.parametrize("kernel", ["cpu-int4", "cpu-fp32", "reference"])
def test_per_token_linears_equal_the_reference_with_each_kernel(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, kernel: str
) -> None:
    monkeypatch.setenv("MERGEQUANT_KERNEL", kernel)
    x = torch.randn(9, 172, generator=torch.Generator().manual_seed(0))
    down = RowParallelLinear(
        172, 64, bias=False, params_dtype=torch.float32, quant_config=plugin_config(checkpoint),
        prefix=f"{BLOCK}.mlp.down_proj",
    )  # fmt: skip
    assert down.quant_method.kernel.name == kernel
    load_parts(down, checkpoint, {"mlp.down_proj": None})
    assert torch.equal(run(down, x), reference_outputs(checkpoint, ["mlp.down_proj"], x))
    assert "weight_packed" not in dict(down.named_parameters())


@pytest.mark.usefixtures("_ranks")
def test_a_linear_that_was_not_loaded_is_refused(checkpoint: Path) -> None:
    gate_up = MergedColumnParallelLinear(
        64, [172, 172], bias=False, params_dtype=torch.float32,
        quant_config=plugin_config(checkpoint), prefix=f"{BLOCK}.mlp.gate_up_proj",
    )  # fmt: skip
    with pytest.raises(FormatError, match=r"gate_up_proj.weight_scale was not loaded in full"):
        load_parts(gate_up, checkpoint, {"mlp.gate_proj": 0})


@pytest.mark.usefixtures("_ranks")
def test_shards_that_cut_words_are_refused_with_sizes_and_remedy() -> None:
    linear = linear_form((64, 172), "dynamic")
    method = MergeQuantLinearMethod(f"{BLOCK}.mlp.down_proj", [linear], None)
    sizes: dict[str, Any] = {
        "layer": torch.nn.Module(),
        "output_partition_sizes": [64],
        "output_size": 64,
        "params_dtype": torch.float32,
        "weight_loader": lambda *_: None,
    }
    message = (
        r"model\.layers\.0\.mlp\.down_proj: 172 input channels over 2 tensor-parallel ranks are "
        r"86 a rank, .* \(8 codes each\): use --tensor-parallel-size 1\."
    )
    with pytest.raises(ValueError, match=message):
        method.create_weights(input_size_per_partition=86, input_size=172, **sizes)
    with pytest.raises(ValueError, match=r"--tensor-parallel-size 1 or 2\."):
        method.create_weights(input_size_per_partition=44, input_size=176, **sizes)
    method.create_weights(input_size_per_partition=88, input_size=176, **sizes)


@pytest.mark.usefixtures("_ranks")
def test_linears_outside_the_contract_stay_in_the_models_dtype(checkpoint: Path) -> None:
    plugin = plugin_config(checkpoint)
    vision = RowParallelLinear(8, 8, quant_config=plugin, prefix="vision.block.proj")
    assert isinstance(vision.quant_method, UnquantizedLinearMethod)
    assert plugin.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None


def test_lora_is_refused(checkpoint: Path) -> None:
    config = VllmConfig()
    config.lora_config = LoRAConfig()
    with (
        set_current_vllm_config(config),
        pytest.raises(ValueError, match="cannot be served with --enable-lora"),
    ):
        plugin_config(checkpoint).get_quant_method(torch.nn.Linear(2, 2), "lm_head")


def test_weights_in_host_memory_are_refused(checkpoint: Path) -> None:
    config = VllmConfig()
    config.offload_config.uva.cpu_offload_gb = 4
    with (
        set_current_vllm_config(config),
        pytest.raises(ValueError, match="serve without --cpu-offload-gb"),
    ):
        plugin_config(checkpoint).get_quant_method(torch.nn.Linear(2, 2), "lm_head")


def test_the_kernel_is_in_vllms_compile_cache_key() -> None:
    def key(*kernels: str) -> str:
        config = VllmConfig()
        with set_current_vllm_config(config):
            for kernel in kernels:
                record_in_compile_cache_key(kernel)
        return str(config.compute_hash())

    keys = {key(), key("cpu-fp32"), key("reference"), key("cpu-fp32", "reference")}
    assert len(keys) == 4
    assert key("cpu-fp32", "cpu-fp32") == key("cpu-fp32")


def damaged(checkpoint: Path, target: Path, change: str) -> Path:
    shutil.copytree(checkpoint, target)
    file = target / "model-00001-of-00003.safetensors"
    tensors = load_file(file)
    name = f"{BLOCK}.mlp.up_proj.weight_packed"
    if change == "missing":
        del tensors[name]
    elif change == "misshapen":
        tensors[name] = tensors[name][:, :-1].contiguous()
    elif change == "extra":
        tensors[f"{BLOCK}.mlp.up_proj.g_idx"] = torch.arange(4)
    elif change == "missing norm":
        del tensors[f"{BLOCK}.input_layernorm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"'model.layers.0.mlp.up_proj.weight_packed' is missing"),
        ("misshapen", r"up_proj.weight_packed' has shape \[172, 7\], not \[172, 8\]"),
        ("extra", r"'model.layers.0.mlp.up_proj.g_idx' does not belong"),
        ("missing norm", r"'model.layers.0.input_layernorm.weight' is missing"),
    ],
)
def test_bad_checkpoints_are_refused_from_their_headers(
    tmp_path: Path, checkpoint: Path, change: str, message: str
) -> None:
    folder = damaged(checkpoint, tmp_path / "bad", change)
    with pytest.raises(FormatError, match=message):
        plugin_config(folder).maybe_update_config(str(folder), hf_config=None, revision=None)
    plugin_config(checkpoint).maybe_update_config(str(checkpoint))


def test_an_unknown_kernel_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    monkeypatch.setenv("MERGEQUANT_KERNEL", "warp9")
    with pytest.raises(ValueError, match="'warp9' is not a kernel"):
        plugin_config(checkpoint)


def test_a_model_in_16_bits_is_refused_by_what_to_do() -> None:
    # vLLM makes the configuration so where config.json has none.
    with pytest.raises(ValueError, match="without --quantization mergequant, or make"):
        MergeQuantConfig()


@pytest.mark.usefixtures("_ranks")
@pytest.mark.parametrize("prefix", ["", "draft_model.", "language_model."])
def test_linears_are_found_within_another_model(checkpoint: Path, prefix: str) -> None:
    plugin = plugin_config(checkpoint)
    method = plugin.get_quant_method(
        RowParallelLinear(64, 64, params_dtype=torch.float32), f"{prefix}{BLOCK}.self_attn.o_proj"
    )
    assert isinstance(method, MergeQuantLinearMethod) and method.format.dynamic is not None
    assert [x.shape for x in plugin._linears_behind(f"{prefix}{BLOCK}.self_attn.qkv_proj")] == [
        (64, 64),
        (32, 64),
        (32, 64),
    ]
    assert plugin._linear(f"{prefix}{BLOCK}.self_attn.norm") is None


def test_what_is_stored_as_one_is_found_where_vllm_says_it_merges_parts(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    model = make_model(tmp_path / "model", "glm4")
    plugin = plugin_config(quantize(model, tmp_path / "made", [text], FEW, progress=False))
    assert plugin.packed_modules_mapping["gate_up_proj"] == ["gate_proj", "up_proj"]
    (found,) = plugin._linears_behind(f"{BLOCK}.mlp.gate_up_proj")
    assert found.shape == (2 * 172, 64)


@pytest.mark.usefixtures("_ranks")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["static", "dynamic", "every tensor"])
def test_dummy_weights_are_such_as_a_quantizer_writes(
    monkeypatch: pytest.MonkeyPatch, form: str, bits: int
) -> None:
    fields: dict[str, Any] = {"weight_bits": bits, "activation_bits": bits}
    if form == "every tensor":
        fields |= {"columns": 96, "offsets": True, "group_size": 32, "zero_points": True}
    linear = linear_form((32, 64), "dynamic" if form == "dynamic" else "static", **fields)
    monkeypatch.setattr(get_current_vllm_config().load_config, "load_format", "dummy")
    layer = torch.nn.Module()
    method = MergeQuantLinearMethod("x", [linear], "reference")
    method.create_weights(
        layer, 64, [32], 64, 32, torch.float32, weight_loader=lambda *_: None
    )  # nothing is loaded
    method.process_weights_after_loading(layer)
    spread = 1.0 if form == "dynamic" else 2.0 ** (bits - 3)
    y = method.apply(layer, spread * torch.randn(50, 64))
    assert y.shape == (50, 32) and 0.5 < float(y.std()) < 2.0


def test_on_a_cpu_compiled_models_are_cached_where_they_can_be_read_again(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    plugin_config(checkpoint)
    assert os.environ.get(SWITCH) == ("0" if current_platform.is_cpu() else None)
    monkeypatch.setenv(SWITCH, "1")
    plugin_config(checkpoint)
    assert os.environ[SWITCH] == "1"


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_is_not_the_head_has_no_second_copy(
    tmp_path: Path, text: Path, tied: bool
) -> None:
    options = SMALL.model_copy(update={"head_bits": 16})
    model = make_model(tmp_path / "model", tied=tied)
    folder = quantize(model, tmp_path / "out", [text], options, progress=False)
    with set_current_vllm_config(VllmConfig()):
        table = VocabParallelEmbedding(
            258, 64, quant_config=plugin_config(folder), prefix="model.embed_tokens"
        )
    assert isinstance(table.quant_method, LookupMethod) == (not tied)
    table.quant_method.process_weights_after_loading(table)
    assert hasattr(table, "cpu_linear") == (tied and current_platform.is_cpu())

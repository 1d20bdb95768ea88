"""Folders of a model of random weights as a server finds them on disk: 16 bits, and quantized."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.common.served_variants import find_variant
from benchmarks.common.shapes import Model
from mergequant.model.architectures import find
from mergequant.model.shapes import model_tensors
from mergequant_vllm.format import BLOCK, expected_tensors, parse

FILE = "model.safetensors"


def write_source(folder: Path, model: Model, context: int) -> Path:
    """The model in bfloat16."""
    config = model.config(context)
    shapes = model_tensors(find(model.model_type), config)
    return _write(folder, config, {name: _weight(name, shape) for name, shape in shapes.items()})


def write_quantized(folder: Path, model: Model, context: int) -> Path:
    """The model as a mergequant checkpoint."""
    variant, _ = find_variant("mergequant")
    assert variant.quantization is not None
    written = variant.quantization(model, model.num_hidden_layers)
    written["tensors"] = _outside_linears(model)
    drawn = {}
    for name, wanted in expected_tensors(parse(written)).items():
        kind = name.rsplit(".", 1)[-1]
        if wanted.dtype == "I32":
            drawn[name] = torch.randint(-(2**31), 2**31, wanted.shape, dtype=torch.int32)
        elif wanted.dtype == "F32":
            drawn[name] = torch.full(wanted.shape, 0.9)
        elif kind == "weight_scale":
            drawn[name] = torch.full(wanted.shape, variant.weight_step, dtype=torch.bfloat16)
        else:
            drawn[name] = _weight(name, wanted.shape) * variant.norm
    config = {**model.config(context), "quantization_config": written}
    return _write(folder, {**config, "tie_word_embeddings": False}, drawn)


def _outside_linears(model: Model) -> dict[str, list[int]]:
    hidden = model.hidden_size
    block = f"model.layers.{BLOCK}"
    norms = ("model.norm", f"{block}.input_layernorm", f"{block}.post_attention_layernorm")
    table = {"model.embed_tokens.weight": [model.vocab_size, hidden]}
    return table | {f"{name}.weight": [hidden] for name in norms}


def _weight(name: str, shape: tuple[int, ...]) -> Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def _write(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder

"""Folders of a model of random weights as a server finds them on disk: 16 bits, and quantized."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.common.served_variants import find_variant
from benchmarks.common.shapes import Model
from mergequant_vllm.format import BLOCK, expected_tensors, parse

Shapes = Mapping[str, tuple[int, ...]]
FILE = "model.safetensors"


def write_source(folder: Path, model: Model, context: int) -> Path:
    """The model in bfloat16."""
    return _write(folder, model.config(context), dict(_random_weights(_shapes(model))))


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


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    hidden, inner = model.hidden_size, model.intermediate_size
    linears = {
        "self_attn.q_proj": (model.query_size, hidden),
        "self_attn.k_proj": (model.key_value_size, hidden),
        "self_attn.v_proj": (model.key_value_size, hidden),
        "self_attn.o_proj": (hidden, model.query_size),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    patterns = {name: tuple(shape) for name, shape in _outside_linears(model).items()}
    patterns |= {f"model.layers.{BLOCK}.{name}.weight": shape for name, shape in linears.items()}
    if not model.tie_word_embeddings:
        patterns["lm_head.weight"] = (model.vocab_size, hidden)
    return {
        pattern.replace(BLOCK, str(number)): shape
        for pattern, shape in patterns.items()
        for number in (range(model.num_hidden_layers) if BLOCK in pattern else (0,))
    }


def _random_weights(shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        yield name, _weight(name, shape)


def _weight(name: str, shape: tuple[int, ...]) -> Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def _write(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder

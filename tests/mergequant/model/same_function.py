"""What a reader's tensors compute, in any dtype: for views that must not change the function."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from mergequant.methods.rotate import (
    OnlineRotation,
)
from mergequant.model.architectures import find
from mergequant.model.reader import Reader
from mergequant_vllm.kernels.hadamard import reference
from tests.tiny import make_model

WINDOWS = torch.randint(2, 250, (2, 24), generator=torch.Generator().manual_seed(0))


class ExactNorm(nn.Module):
    """An RMSNorm in the input's dtype: transformers' own computes in float32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        gemma = type(norm).__name__.startswith("Gemma")
        self.weight = nn.Parameter(norm.weight.data + (1 if gemma else 0), requires_grad=False)
        self.eps = norm.eps if gemma else norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


def exact_layer_norm(norm: Any, x: Tensor) -> Tensor:
    """Cohere's norm in the input's dtype."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, None, norm.variance_epsilon)


def in_float64(rotation: OnlineRotation, x: Tensor) -> Tensor:
    """What the server does to an input, by full matrices and without its rounding."""
    if rotation.heads is not None:
        x = reference.mix_heads_by_matrix(x, rotation.heads)
    return x if rotation.hadamard is None else reference.rotate_by_matrix(x, rotation.hadamard)


def logits(reader: Reader, dtype: torch.dtype) -> Tensor:
    """What `transformers` computes from a reader's tensors and configuration."""
    config = AutoConfig.from_pretrained(str(reader.folder))
    config.tie_word_embeddings = reader.config.get("tie_word_embeddings", False)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    architecture = find(reader.config["model_type"])
    tensors = {architecture.in_transformers(name): reader.read(name) for name in reader.headers}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    for name, module in list(model.named_modules()):
        if dtype == torch.float64 and type(module).__name__.endswith("RMSNorm"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ExactNorm(module))
        cohere = re.fullmatch(r"Cohere\d*LayerNorm", type(module).__name__)
        if dtype == torch.float64 and cohere:
            module.forward = partial(exact_layer_norm, module)
    for name, rotation in reader.online.items():
        for linear in (m for full, m in model.named_modules() if full.endswith(name)):
            rotated = partial(in_float64, rotation) if dtype == torch.float64 else rotation
            linear.register_forward_pre_hook(
                lambda _, inputs, rotated=rotated: (rotated(inputs[0]),)
            )
    with torch.no_grad():
        result: Tensor = model(WINDOWS, use_cache=False).logits
    return result


def as_heads_of_24(folder: Path) -> Path:
    """6 and 3 heads of 32 channels are as many as 8 and 4 heads of 24."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 24}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def model_folder(folder: Path, case: str, tied: bool) -> Path:
    """A model with 96 channels, three value heads, and all biases that its kind may have."""
    model_type = case.removesuffix("-24")
    biases = {
        "llama": {"attention_bias": True, "mlp_bias": True},
        "granite": {"attention_bias": True, "mlp_bias": True},
        "smollm3": {"attention_bias": True, "mlp_bias": True},
        "gemma2": {"attention_bias": True},
        "gemma3_text": {"attention_bias": True},
        "stablelm": {"use_qkv_bias": True},
    }
    make_model(
        folder,
        model_type,
        hidden=96,
        heads=6,
        kv_heads=3,
        tied=tied,
        **biases.get(model_type, {}),
    )
    return as_heads_of_24(folder) if case.endswith("-24") else folder

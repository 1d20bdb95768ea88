"""Functions that run in vLLM's worker, on the served model."""

from typing import Any

import torch
from torch import Tensor, nn

from mergequant_vllm.kernels.norm_round.reference import static_codes
from mergequant_vllm.kernels.token_quant.reference import token_codes

# Prefix in vLLM -> what went in and came out of it, in the last step that was watched.
SEEN: dict[str, tuple[Tensor, Tensor]] = {}


def start(model: nn.Module) -> list[str]:
    """Watch every quantized linear; returns their names."""
    names = []
    for name, module in model.named_modules():
        if hasattr(module, "kernel_weight"):
            module.register_forward_hook(_remember(name))
            names.append(name)
    return names


def _remember(name: str) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        SEEN.setdefault(name, (inputs[0].clone(), y.clone()))

    return hook


def forget(_: nn.Module) -> None:
    """Drop what was seen while vLLM warmed up."""
    SEEN.clear()


def collect(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Input, output, and the served kernel's own codes and integer sums of each linear."""
    found = {}
    for name, (x, y) in SEEN.items():
        layer: Any = model.get_submodule(name)
        method = layer.quant_method
        bits, code_dtype = method.format.activation_bits, method.kernel.code_dtype
        step = None
        if method.spec.dynamic:
            codes, step = token_codes(x, layer.input_clip, bits, code_dtype)
        else:
            codes = static_codes(x, bits, code_dtype)
        ones = torch.ones_like(layer.weight_scale)
        sums = method.kernel.linear(codes, layer.kernel_weight, ones, None, None, torch.float64)
        seen = {"x": x, "y": y, "codes": codes, "sums": sums, "step": step}
        found[name] = {key: None if value is None else value.cpu() for key, value in seen.items()}
    return found

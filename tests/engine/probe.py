"""Functions that run in vLLM's worker, on the served model."""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from mergequant_vllm.kernels.codes import read_codes
from mergequant_vllm.kernels.linear.packed import PackedLinear

# Prefix in vLLM -> what went in and came out of it, in the last step that was watched.
SEEN: dict[str, tuple[Tensor, Tensor]] = {}


def start(model: nn.Module) -> list[str]:
    """Watch every quantized linear; returns their names."""
    names = []
    for name, module in model.named_modules():
        if hasattr(module, "product"):
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
    linears = {}
    for name, (x, y) in SEEN.items():
        layer: Any = model.get_submodule(name)
        method = layer.quant_method
        laid_out, step, _ = layer.quantizer(x)
        codes = read_codes(laid_out, method.kernel.layout)
        sums = integer_sums(layer.product, laid_out)
        tensors = {"x": x, "y": y, "codes": codes, "sums": sums, "step": step}
        linears[name] = {
            key: None if value is None else value.cpu() for key, value in tensors.items()
        }
    return linears


def integer_sums(product: Any, codes: Tensor) -> Tensor:
    """The prepared linear's own sums: its product with steps of 1 and no constant, in float32."""
    plain = copy.copy(product)
    if isinstance(product, PackedLinear):
        plain._form = (*product._form[:-1], torch.float32)
    else:
        plain.spec = dataclasses.replace(product.spec, dtype=torch.float32)
    plain._buffers = {
        **product._buffers,
        "weight_step": torch.ones_like(product.weight_step),
        "constant_with_bias": None,
        "constant_without_bias": None,
    }
    y: Tensor = plain(codes, None, None, False)
    return y

"""Linears of a loaded block, put in the place of its own: as served, or as training needs them."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from mergequant.layers.native_linear import native_linear
from mergequant.layers.served_linear import served_linear
from mergequant.layers.simulated_linear import SimulatedLinear
from mergequant.model.block import Block
from mergequant_vllm.format import LinearFormat
from mergequant_vllm.kernels.linear.constant import constant_of
from mergequant_vllm.packing import unpack


def load_stored(
    block: Block, tensors: Mapping[str, Tensor], linears: Mapping[str, LinearFormat]
) -> None:
    """Put a quantized block's stored tensors into `block`, in float32.

    What the next block is calibrated on is then a function of the stored tensors alone: the same
    bits, whether they were made a moment ago or by a run that was killed.

    Args:
        tensors: what is stored, by name within the block.
        linears: how each quantized linear is stored, by name within the block.
    """
    for name, form in linears.items():
        read = partial(_read, block, name, tensors)
        codes = unpack(read("weight_packed"), form.weight.bits, form.in_features)
        block.replace(name, _as_served(form, codes, read))
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if owner not in linears:
            weight = nn.Parameter(tensor.to(block.device, torch.float32), requires_grad=False)
            setattr(block.module.get_submodule(owner), leaf, weight)


def replace_by_served(
    block: Block, name: str, form: LinearFormat, codes: Tensor, tensors: Mapping[str, Tensor]
) -> None:
    """Put linear `name` into the block as the server will compute it.

    Args:
        codes: int8 [out, K].
        tensors: what else is stored of the linear, by suffix.
    """
    whole = {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
    read = partial(_read, block, name, whole)
    block.replace(name, _as_served(form, codes, read))


def _as_served(form: LinearFormat, codes: Tensor, read: Callable[[str], Tensor]) -> nn.Module:
    """The fastest module that computes what the definition says, bit for bit."""
    native = native_linear(form, codes, read)
    return served_linear(form, codes, read, torch.float32) if native is None else native


def replace_by_simulated(
    block: Block,
    name: str,
    read: Callable[[Tensor], Tensor],
    weight: nn.Module,
    output_offset: Tensor | None = None,
) -> None:
    """Put a linear of floating-point products into the block, see `SimulatedLinear`."""
    bias = block.source_tensors.get(f"{name}.bias")
    constant = constant_of(None if bias is None else bias.to(block.device), output_offset)
    block.replace(name, SimulatedLinear(read, weight, constant))


def _read(block: Block, name: str, tensors: Mapping[str, Tensor], suffix: str) -> Tensor:
    full = f"{name}.{suffix}"
    # A bias is not quantized: it stays what the source model has.
    return (tensors[full] if full in tensors else block.source_tensors[full]).to(block.device)

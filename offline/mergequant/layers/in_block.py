"""A loaded block, made to compute with what the checkpoint stores of it."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from mergequant.layers.served_linear import from_stored
from mergequant.model.decoder import Block
from mergequant_vllm.format import LinearFormat


def load_stored(
    block: Block,
    tensors: Mapping[str, Tensor],
    linears: Mapping[str, LinearFormat],
    device: torch.device,
) -> None:
    """Put a quantized block's stored tensors into `block`, in float32.

    What the next block is calibrated on is then a function of the stored tensors alone: the same
    bits, whether they were written a moment ago or by a run that was killed.

    Args:
        tensors: what is stored, by name within the block.
        linears: how each linear is stored, by name within the block.
    """
    for name, form in linears.items():
        stored = partial(_read, tensors, name, device)
        block.replace(name, from_stored(form, stored, torch.float32))
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if owner not in linears:
            weight = nn.Parameter(tensor.to(device, torch.float32), requires_grad=False)
            setattr(block.module.get_submodule(owner), leaf, weight)


def _read(tensors: Mapping[str, Tensor], name: str, device: torch.device, suffix: str) -> Tensor:
    return tensors[f"{name}.{suffix}"].to(device)

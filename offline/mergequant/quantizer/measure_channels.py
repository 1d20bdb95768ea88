"""What the transforms in the weights need to know of channels, from the full-precision model.

R1 mixes channels of the residual whose variance is alike, once each token is divided by its size as
a norm does; it is measured where blocks meet. The inputs of o and down are divided by scales after
which no channel's rounding costs more than another's.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mergequant.methods.equalize import channel_scales, relative_energy
from mergequant.methods.rotate import group_count
from mergequant.model.architecture import Linear, widths
from mergequant.model.block import Block
from mergequant.model.channels import Channels
from mergequant.model.decoder import Decoder
from mergequant.model.equalized_reader import equalized, shared_channels
from mergequant.options import Options
from mergequant.quantizer.decision import possible_rotations
from mergequant.quantizer.prepare import open_model

_TOKENS = 4096  # about so many tell a channel's variance to a few percent


def measure_channels(
    model: str | Path, windows: Tensor, options: Options, device: torch.device, progress: bool
) -> Channels:
    """What `options` ask for, from one walk through the blocks.

    Args:
        model: folder or hub id.
        windows: token ids int64 [samples, length]; the first are used.
    """
    reader, architecture, _ = open_model(model, options.model_copy(update={"rotation": "none"}))
    width = widths(reader.config)["hidden"]
    rotated = set(possible_rotations(architecture, reader.config, options)) - {"none"}
    graded = options.residual_rotation == "graded" and options.activations == "static"
    graded = graded and bool(rotated) and group_count(width) > 1
    if not graded and not options.equalization:
        return Channels()
    used = windows[: min(options.statistics_samples, max(1, _TOKENS // windows.shape[1]))]
    decoder = Decoder(reader, architecture, device)
    batches = decoder.embed(used, len(used), len(used)).batches
    shares = torch.zeros(width, dtype=torch.float64)
    scales: dict[str, Tensor] = {}
    blocks = range(int(reader.config["num_hidden_layers"]))
    for number in tqdm(blocks, desc="Pilot, channels", unit="block", disable=not progress):
        shares += variance_shares(batches).cpu()
        with decoder.block(number) as block:
            scaled = [
                linear
                for linear, _ in equalized(architecture)
                if options.equalization and not options.ignores(block.name_of(linear.name))
            ]
            for name, scale in _scales_and_advance(block, scaled, reader.config, batches):
                scales[block.name_of(name)] = scale.to("cpu", torch.float32)
    order = shares.argsort(descending=True, stable=True) if graded else None
    return Channels(order, scales)


def _scales_and_advance(
    block: Block, linears: Sequence[Linear], config: Mapping[str, Any], batches: list[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Scales of the block's `linears`, by name; `batches` become what the block emits."""
    energy: dict[str, Tensor] = {}
    for index, hidden in enumerate(batches):
        batches[index], inputs = block.forward_with_inputs(hidden, [x.name for x in linears])
        for name, x in inputs.items():
            energy[name] = energy.get(name, 0.0) + relative_energy(x)
    for linear in linears:
        weight = block.weight(linear.name)
        columns = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float64)
        parts = (energy[linear.name], columns.square())
        yield linear.name, channel_scales(*(shared_channels(x, config, linear) for x in parts))


def variance_shares(batches: Sequence[Tensor]) -> Tensor:
    """Each channel's share of the variance over tokens: float64 [n].

    Args:
        batches: hidden states [..., n], of which each token is first divided by its root mean
            square, as a norm does.
    """
    x = torch.cat([batch.reshape(-1, batch.shape[-1]) for batch in batches])
    x = x / x.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-30)
    variance = x.var(dim=0, unbiased=False).to(torch.float64)
    return variance / variance.sum().clamp(min=1e-30)

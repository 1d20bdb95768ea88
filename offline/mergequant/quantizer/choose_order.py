"""Which channels of the residual a rotation mixes with each other: those of like variance.

What counts is the variance of what norms make of them, which divide each token by its size. It is
measured where blocks meet, on the full-precision model.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mergequant.methods.rotate import group_count
from mergequant.model.architecture import widths
from mergequant.model.decoder import Decoder
from mergequant.options import Options
from mergequant.quantizer.decision import possible_rotations
from mergequant.quantizer.prepare import open_model

_TOKENS = 4096  # about so many tell a channel's variance to a few percent


def resolve_order(
    model: str | Path, windows: Tensor, options: Options, device: torch.device, progress: bool
) -> list[int] | None:
    """Channels of the residual by falling variance; None where R1 mixes them all, or there is none.

    Args:
        model: folder or hub id.
        windows: token ids int64 [samples, length]; the first are used.
    """
    plain = options.model_copy(update={"rotation": "none"})
    reader, architecture, _ = open_model(model, plain)
    rotated = set(possible_rotations(architecture, reader.config, options)) - {"none"}
    grades = options.residual_rotation == "graded" and options.activations == "static"
    if not (rotated and grades) or group_count(widths(reader.config)["hidden"]) == 1:
        return None
    used = windows[: max(1, _TOKENS // windows.shape[1])]
    decoder = Decoder(reader, architecture, device)
    batches = decoder.embed(used, len(used), len(used)).batches
    blocks = int(reader.config["num_hidden_layers"])
    shares = torch.zeros(widths(reader.config)["hidden"], dtype=torch.float64)
    for _ in decoder.walk(batches, blocks, "Pilot, channels", progress):
        shares += variance_shares(batches).cpu()
    order: list[int] = shares.argsort(descending=True, stable=True).tolist()
    return order


def variance_shares(batches: Sequence[Tensor]) -> Tensor:
    """Each channel's share of the variance over tokens: float64 [n].

    Args:
        batches: hidden states [..., n], of which each token is first divided by its root mean
            square, as a norm does.
    """
    x = torch.cat([batch.reshape(-1, batch.shape[-1]) for batch in batches]).to(torch.float64)
    x = x / x.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-30)
    variance = x.var(dim=0, unbiased=False)
    return variance / variance.sum().clamp(min=1e-30)

"""The pilots, one after the other: which channels a rotation mixes, whether to rotate, bits of what
is rotated, then reconstruction."""

from pathlib import Path

import torch
from torch import Tensor

from mergequant.model.decoder import Decoder
from mergequant.options import Options
from mergequant.quantizer.choose_bits import resolve_bits
from mergequant.quantizer.choose_order import resolve_order
from mergequant.quantizer.choose_reconstruction import resolve_reconstruction
from mergequant.quantizer.choose_rotation import resolve_rotation
from mergequant.quantizer.decision import Decision, with_bits
from mergequant.quantizer.prepare import open_model


def decide(
    model: str | Path, windows: Tensor, options: Options, device: torch.device, progress: bool
) -> Decision:
    """Measure what `options` leave to be measured.

    Args:
        model: folder or hub id.
        windows: token ids int64 [samples, length].
    """
    order = resolve_order(model, windows, options, device, progress)
    rotation = resolve_rotation(model, windows, options, order, device, progress)
    rotated = options.model_copy(update={"rotation": rotation})
    order = None if rotation == "none" else order
    reader, architecture, _ = open_model(model, rotated, order)
    decoder = Decoder(reader, architecture, device)
    bits = resolve_bits(decoder, windows, rotated, progress)
    widened = rotated.model_copy(update={"overrides": with_bits(rotated.overrides, bits)})
    decision = resolve_reconstruction(decoder, windows, widened, progress)
    return decision.model_copy(update={"bits": bits, "order": order})

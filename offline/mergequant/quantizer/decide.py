"""The pilots, one after the other: rotation first, then reconstruction of what is rotated."""

from pathlib import Path

import torch
from torch import Tensor

from mergequant.model.decoder import Decoder
from mergequant.options import Options
from mergequant.quantizer.choose_reconstruction import resolve_reconstruction
from mergequant.quantizer.choose_rotation import resolve_rotation
from mergequant.quantizer.decision import Decision
from mergequant.quantizer.prepare import open_model


def decide(
    model: str | Path, windows: Tensor, options: Options, device: torch.device, progress: bool
) -> Decision:
    """Measure what `options` leave to be measured.

    Args:
        model: folder or hub id.
        windows: token ids int64 [samples, length].
    """
    rotation = resolve_rotation(model, windows, options, device, progress)
    rotated = options.model_copy(update={"rotation": rotation})
    reader, architecture, _ = open_model(model, rotated)
    decoder = Decoder(reader, architecture, device)
    return resolve_reconstruction(decoder, windows, rotated, progress)

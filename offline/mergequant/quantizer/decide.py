"""The pilots, one after the other: channels, rotation, bits of what is rotated, reconstruction."""

from pathlib import Path

import torch
from torch import Tensor

from mergequant.model.channels import Channels
from mergequant.model.decoder import Decoder
from mergequant.options import Options
from mergequant.quantizer.choose_bits import resolve_bits
from mergequant.quantizer.choose_reconstruction import resolve_reconstruction
from mergequant.quantizer.choose_rotation import resolve_rotation
from mergequant.quantizer.decision import Decision, with_bits
from mergequant.quantizer.pilot_walk import walk_plain_model
from mergequant.quantizer.prepare import open_model


def decide(
    model: str | Path, windows: Tensor, options: Options, device: torch.device, progress: bool
) -> tuple[Decision, Channels]:
    """Measure what `options` leave to be measured.

    Args:
        model: folder or hub id.
        windows: token ids int64 [samples, length].
    """
    walked = walk_plain_model(model, windows, options, device, progress)
    rotation = resolve_rotation(model, walked, options, device, progress)
    rotated = options.model_copy(update={"rotation": rotation})
    reader, architecture, _ = open_model(model, rotated, walked.channels)
    decoder = Decoder(reader, architecture, device)
    bits = resolve_bits(decoder, windows, rotated, progress)
    widened = rotated.model_copy(update={"overrides": with_bits(rotated.overrides, bits)})
    decision = resolve_reconstruction(decoder, walked.inputs, widened, progress)
    found = {"bits": bits, "plain_loss": walked.loss}
    return decision.model_copy(update=found), walked.channels

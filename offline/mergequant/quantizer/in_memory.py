"""A quantized model that is never written: for comparisons that no checkpoint can hold."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mergequant.calibration.text import sha256_of
from mergequant.layers.served_linear import from_stored
from mergequant.model.decoder import Decoder
from mergequant.options import Options
from mergequant.output.checkpoint_plan import checkpoint_format
from mergequant.quantizer.block import quantize_block
from mergequant.quantizer.choose_reconstruction import resolve_reconstruction
from mergequant.quantizer.head import quantize_head
from mergequant.quantizer.run import (
    calibration_of,
    embed,
    find_device,
    go_behind,
    open_model,
    progress_bar,
)


def quantize_in_memory(
    model: str | Path,
    calibration: Sequence[str | Path],
    options: Options,
    *,
    progress: bool = True,
) -> tuple[Any, list[dict[str, Any]]]:
    """As `quantize`, for any options; the whole model is held in float32 on the device.

    Returns:
        a `PreTrainedModel` in the reference arithmetic, and the lines of the report.

    Raises:
        InputError: the input is at fault.
    """
    reader, architecture, _ = open_model(model, options)
    reader.check_finite()
    windows = calibration_of(reader, calibration, options)
    decoder = Decoder(reader, architecture, find_device(options.device))
    options = resolve_reconstruction(decoder, windows, options, progress)
    contract = checkpoint_format(reader.config, architecture, options, sha256_of(windows))
    activations = embed(decoder, windows, options)
    report = []
    with progress_bar(contract, options, 0, progress) as bar:
        for number in range(contract.blocks):
            bar.set_description(f"Block {number + 1}/{contract.blocks}")
            with decoder.block(number, keep=True) as block:
                targets = [block.forward(hidden) for hidden in activations.exact]
                _, lines = quantize_block(
                    block, architecture, activations, targets, options, contract.linears, bar
                )
                report += lines
                go_behind(block, activations, targets)
    whole = decoder.whole_model()
    for name, form in contract.outer.items():
        found = quantize_head(reader.read(f"{name}.weight"))
        setattr(whole, name, from_stored(form, found.__getitem__, torch.float32).to(decoder.device))
    return whole, report

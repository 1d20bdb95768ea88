"""A quantized model that is never written: for comparisons that no checkpoint can hold."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mergequant.calibration.text import sha256_of
from mergequant.layers.served_linear import from_stored
from mergequant.model.decoder import Decoder
from mergequant.options import Options
from mergequant.quantizer.decide import decide
from mergequant.quantizer.head import quantize_head
from mergequant.quantizer.plan import Plan
from mergequant.quantizer.prepare import calibration_of, find_device, open_folder, open_model
from mergequant.quantizer.resolve import make_plan
from mergequant.quantizer.result import report_lines
from mergequant.quantizer.walk import walk_blocks


def quantize_in_memory(
    model: str | Path,
    calibration: Sequence[str | Path],
    options: Options,
    change: Callable[[Plan], Plan] = lambda plan: plan,
    *,
    progress: bool = True,
) -> tuple[Any, list[dict[str, Any]]]:
    """Quantize as `quantize` does, by any plan; the whole model stays in float32 on the device.

    Args:
        change: makes a baseline's plan of the one that the options make.

    Returns:
        a `PreTrainedModel` in the reference arithmetic, and the lines of the report.

    Raises:
        InputError: the input is at fault.
    """
    folder, _ = open_folder(model)
    folder.check_finite()
    windows = calibration_of(folder, calibration, options)
    device = find_device(options.device)
    decision, channels = decide(model, windows, options, device, progress)
    decided = decision.applied_to(options)
    reader, architecture, _ = open_model(model, decided, channels)
    reader.check_finite()
    decoder = Decoder(reader, architecture, device)
    plan = make_plan(architecture, reader.config, decided, sha256_of(windows))
    plan = change(plan)
    report = []
    for _, results in walk_blocks(decoder, plan, windows, keep=True, progress=progress):
        report += report_lines(results, channels.outliers)
    whole = decoder.whole_model()
    for name, form in plan.checkpoint.outer.items():
        stored = quantize_head(reader.read(f"{name}.weight"))
        head = from_stored(form, stored.__getitem__, torch.float32)
        setattr(whole, name, head.to(decoder.device))
    return whole, report

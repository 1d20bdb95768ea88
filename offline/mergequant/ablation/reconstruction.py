"""Which reconstruction the rows have: decided once a rotation, and the same in all its rows.

With `auto` every call of `quantize` measures what is best for its own options. Rows that are to
differ in one thing need one choice: that of the whole method with 4-bit weights.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergequant.ablation.rows import RowMaker, Shapes
from mergequant.ablation.tables import Table
from mergequant.model.decoder import Decoder
from mergequant.options import Options
from mergequant.output.durable_files import write_json
from mergequant.quantizer.choose_reconstruction import resolve_reconstruction
from mergequant.quantizer.pilot_walk import walk_plain_model
from mergequant.quantizer.prepare import calibration_of, find_device, open_model


def kept_shapes(
    file: Path,
    model: Path,
    calibration: Sequence[str | Path],
    base: Options,
    tables: Iterable[Table],
    progress: bool = True,
) -> Shapes:
    """Fields that say how the rows of `tables` are reconstructed, by rotation.

    Choices are kept in `file`; it is read if they were made for the same `base`.
    """
    if "auto" not in (base.reconstruction, base.alpha):
        return {}
    made_for = base.model_dump(mode="json")
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    decided: dict[str, Mapping[str, Any]] = kept["shapes"] if kept.get("base") == made_for else {}
    for rotation in _rotations(tables):
        if rotation not in decided:
            options = RowMaker(base, {}).whole_options(rotation)
            decided[rotation] = _decide(model, calibration, options, progress)
            write_json(file, {"base": made_for, "shapes": decided})
    return decided


def _rotations(tables: Iterable[Table]) -> list[str]:
    """Those of rows with reconstruction."""
    options = (row.options for table in tables for row in table.rows)
    rotations = (x.rotation for x in options if x is not None and x.reconstruction != "none")
    return list(dict.fromkeys(rotations))


def _decide(
    model: Path, calibration: Sequence[str | Path], options: Options, progress: bool
) -> Mapping[str, Any]:
    reader, architecture, _ = open_model(model, options)
    windows = calibration_of(reader, calibration, options)
    device = find_device(options.device)
    walked = walk_plain_model(model, windows, options, device, progress)
    decoder = Decoder(reader, architecture, device)
    decided = resolve_reconstruction(decoder, walked.inputs, options, progress)
    if decided.reconstruction == "none":  # the rows are then equal to those without
        return {"reconstruction": "none"}
    return decided.model_dump(include={"reconstruction", "alpha", "max_extra_channels"})


def describe(shapes: Shapes) -> str:
    """What was chosen where `auto` was asked for, one sentence; else nothing."""
    chosen = [
        f"{shape['reconstruction']} (rotation {rotation}"
        + (f", alpha {shape['alpha']:g})" if "alpha" in shape else ")")
        for rotation, shape in shapes.items()
    ]
    return f"Reconstruction that measured best: {', '.join(chosen)}." if chosen else ""

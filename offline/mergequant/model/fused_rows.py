"""Rows of a linear that the model stores as one matrix and that writes several spaces."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergequant.model.architecture import Architecture, Linear
from mergequant.model.shapes import space_widths, widths


def rows_of(
    architecture: Architecture, linear: Linear, config: Mapping[str, Any]
) -> dict[str, Tensor | None]:
    """Which rows write each space: int64 [width], in the order of its channels; None: all do."""
    if len(linear.written) == 1:
        return dict.fromkeys(linear.written)
    width = space_widths(architecture, config)
    if linear.per_head:
        head = widths(config)["head"]
        numbers = torch.arange(sum(width[x] for x in linear.written))
        by_head = numbers.reshape(-1, len(linear.written), head)
        return {space: by_head[:, i].reshape(-1) for i, space in enumerate(linear.written)}
    rows: dict[str, Tensor | None] = {}
    start = 0
    for space in linear.written:
        rows[space] = torch.arange(start, start + width[space])
        start += width[space]
    return rows

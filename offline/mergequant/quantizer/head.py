"""The head in 8 bits: a step for each row of the vocabulary, activations per token in 8 bits.

Rounded to nearest: 8 bits leave an error far below that of the blocks. A head that the model ties
to its embedding becomes a tensor of its own, since the embedding stays as it is.
"""

from typing import Final

import torch
from torch import Tensor

from mergequant.layers.served_linear import stored_weight
from mergequant.methods.weights import weight_grid
from mergequant.model.rotated_reader import ROWS_AT_ONCE
from mergequant_vllm.format import DynamicInput, LinearForm, WeightForm

BITS: Final = 8
HEAD_FORM: Final = LinearForm(weight=WeightForm(bits=BITS), input=DynamicInput(bits=BITS))


def quantize_head(weight: Tensor) -> dict[str, Tensor]:
    """What a checkpoint stores of a head [vocabulary, hidden], floating point, by suffix."""
    parts = []
    for rows in torch.split(weight, ROWS_AT_ONCE):
        rows = rows.to(torch.float32)
        grid = weight_grid(rows, HEAD_FORM.weight)
        parts.append(stored_weight(grid.round_weight(rows), grid))
    whole = {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}
    return {**whole, "input_clip": torch.ones(1, dtype=torch.float32)}

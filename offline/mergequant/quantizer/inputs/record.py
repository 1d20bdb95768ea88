"""How a stage's linears will read their input: one record, whichever way it was calibrated."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mergequant.errors import InputError
from mergequant.methods.migrate import migrate_weight
from mergequant.methods.reconstruct import Reconstruction, fold_columns
from mergequant.model.architecture import Stage
from mergequant.model.decoder import Block


@dataclass(frozen=True)
class StageInput:
    """How a stage's linears read their input from now on.

    Attributes:
        dequantized: input [t, n] of a linear to what the integer product sees of it, [t, K].
        relaxed: the same without its rounding: clamped, differentiable.
        report: for the report, by field.
        step: float64 [n], what migrates into the weights; static only.
        reconstruction: columns of the linears, or None; static only.
        clip: float32 [1], ratio of the per-token step; dynamic only.
        tensors: the folded norm as it is to be stored, by name within the block.
    """

    dequantized: Callable[[Tensor], Tensor]
    relaxed: Callable[[Tensor], Tensor]
    report: dict[str, Any]
    step: Tensor | None = None
    reconstruction: Reconstruction | None = None
    clip: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def stored(self) -> dict[str, Tensor]:
        """Tensors of the input that every linear of the stage stores, by suffix."""
        if self.clip is not None:
            return {"input_clip": self.clip.cpu().clone()}
        if self.reconstruction is None:
            return {}
        found = {"input_index": self.reconstruction.index.to(torch.int32).cpu()}
        if self.reconstruction.offset is not None:
            found["input_offset"] = self.reconstruction.offset.cpu().clone()
        return found

    def folded_weight(self, weight: Tensor) -> Tensor:
        """W as its codes are chosen: steps migrated, columns reconstructed; [out, n] to [out, K]"""
        if self.step is None:
            return weight
        if self.reconstruction is None:
            return migrate_weight(weight, self.step)
        return fold_columns(weight, self.step, self.reconstruction)


def stacked_weights(block: Block, stage: Stage) -> Tensor:
    """The stage's readers as one matrix: float32 [out, n]."""
    return torch.cat([block.weight(linear.name) for linear in stage.linears])


def refuse_infinite(values: Tensor, name: str) -> None:
    """Raise InputError unless all of what is `name`d, or its statistics, is finite."""
    if not bool(torch.isfinite(values).all()):
        raise InputError(
            f"{name} holds NaN or infinity on the calibration text: the model "
            "overflows in float32; check that its files are whole and that it answers sensibly."
        )

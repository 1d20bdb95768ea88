"""Baselines of the paper's tables that no checkpoint can hold: plans with parts replaced."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from mergequant.calibration.statistics import ChannelMagnitudes
from mergequant.methods.rotate import OnlineRotation
from mergequant.model.decoder import Block
from mergequant.quantizer.inputs.dynamic import DynamicInputPlan
from mergequant.quantizer.inputs.record import CalibratedInput
from mergequant.quantizer.plan import BlockPlan, Plan, ReadersPlan
from mergequant_vllm.rounding import SMALLEST_STEP, largest_code, round_to_codes, smallest_code


@dataclass(frozen=True)
class Baseline:
    """What of the method a row goes without.

    Attributes:
        tensor_mix: o and down have one static step for the tensor (Tables 1 and 4).
        kept_weights: weights stay in floating point (Table 7).
    """

    tensor_mix: bool = False
    kept_weights: bool = False

    @property
    def exported(self) -> bool:
        """Whether a checkpoint can hold the row; else it runs in the reference engine alone."""
        return not (self.tensor_mix or self.kept_weights)

    def change(self, plan: Plan) -> Plan:
        """The plan of this baseline, made of the whole method's."""
        blocks = tuple(self._change_block(block) for block in plan.blocks)
        return replace(plan, blocks=blocks)

    def _change_block(self, block: BlockPlan) -> BlockPlan:
        readers = tuple(self._change_readers(x) for x in block.readers)
        training = None if self.kept_weights else block.training
        return replace(block, readers=readers, training=training)

    def _change_readers(self, readers: ReadersPlan) -> ReadersPlan:
        source, weights = readers.input, readers.weights
        if self.tensor_mix and isinstance(source, DynamicInputPlan):
            source = TensorInputPlan(source.bits, source.rotation)
        if self.kept_weights:
            weights = dict.fromkeys(weights)
        return replace(readers, input=source, weights=weights)


PLAIN: Final = Baseline()


@dataclass(frozen=True)
class TensorInputPlan:
    """One static step for the whole input of o or down.

    Attributes:
        bits: width of an activation code.
        rotation: of the input, by the server.
    """

    bits: int
    rotation: OnlineRotation
    kind: str = "dynamic"

    def calibrate(
        self, block: Block, linears: Sequence[str], batches: Sequence[Tensor]
    ) -> tuple[CalibratedInput, list[Tensor]]:
        """Take the largest magnitude of the calibration text."""
        inputs: list[Tensor] = []
        block.observe(linears[0], batches, inputs.append)
        magnitudes = ChannelMagnitudes()
        for x in inputs:
            magnitudes.add(self.rotation(x))
        step = (magnitudes.largest.amax() / largest_code(self.bits)).clamp(min=SMALLEST_STEP)
        return TensorInput(self.bits, step, self.rotation), inputs


@dataclass(frozen=True)
class TensorInput:
    """An input with one static step, which nothing folds: [] in float32."""

    bits: int
    step: Tensor
    rotation: OnlineRotation
    report: Mapping[str, Any] = field(default_factory=lambda: {"clip": 1.0})
    norm_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    is_served: bool = False

    def dequantized(self, x: Tensor) -> Tensor:
        """x [..., K] rounded to multiples of the step."""
        return round_to_codes(self.rotation(x) / self.step, self.bits) * self.step

    def unrounded(self, x: Tensor) -> Tensor:
        """x [..., K] rotated."""
        return self.rotation(x)

    def relaxed(self, x: Tensor) -> Tensor:
        """x [..., K] clamped to what its codes reach."""
        return self.unrounded(x).clamp(
            smallest_code(self.bits) * self.step, largest_code(self.bits) * self.step
        )

    def folded_weight(self, weight: Tensor) -> Tensor:
        """The weight as it is."""
        return weight

    def output_offset(self, weight: Tensor) -> Tensor | None:
        """Return None: codes are symmetric."""
        return None

    def stored(self) -> dict[str, Tensor]:
        """The clip ratio that a checkpoint would have; none does."""
        return {"input_clip": torch.ones(1, dtype=torch.float32)}

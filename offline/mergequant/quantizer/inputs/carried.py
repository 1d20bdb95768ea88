"""The input of o or down where v or up writes it in units of its steps already."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant.calibration.statistics import ChannelMagnitudes
from mergequant.model.block import Block
from mergequant.quantizer.inputs.record import CalibratedInput, clip_report, refuse_infinite
from mergequant.quantizer.inputs.static_input import StaticInput
from mergequant_vllm.rounding import largest_code


@dataclass(frozen=True)
class CarriedInputPlan:
    """How an input is calibrated whose steps another linear carries: they are chosen already.

    Attributes:
        bits: width of an activation code.
    """

    bits: int
    kind: str = "static"

    def calibrate(
        self, block: Block, linears: Sequence[str], batches: Sequence[Tensor]
    ) -> tuple[CalibratedInput, list[Tensor]]:
        """See what the steps clip of what the quantized block hands on."""
        inputs = block.inputs_of(linears[0], batches)
        magnitudes = ChannelMagnitudes.of(inputs)
        refuse_infinite(magnitudes.energy, f"The input of {block.name_of(linears[0])}")
        most = largest_code(self.bits)
        clip = most / magnitudes.largest.clamp(min=most)
        step = torch.ones(len(clip), dtype=torch.float64, device=clip.device)
        return StaticInput(
            self.bits, step, None, None, None, {"clip": clip_report(clip)}, {}
        ), inputs

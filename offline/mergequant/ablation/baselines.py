"""Baselines of the paper's tables that `quantize` does not make: plans with parts replaced."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor

from mergequant.calibration.statistics import ChannelMagnitudes
from mergequant.methods.clip import ChannelRange
from mergequant.methods.migrate import smooth_steps, tensor_steps
from mergequant.methods.rotate import OnlineRotation
from mergequant.model.block import Block
from mergequant.quantizer.inputs.dynamic import DynamicInputPlan
from mergequant.quantizer.inputs.record import CalibratedInput
from mergequant.quantizer.inputs.static import StaticInputPlan
from mergequant.quantizer.plan import BlockPlan, Plan, ReadersPlan
from mergequant_vllm.rounding import SMALLEST_STEP, largest_code, round_to_codes, smallest_code


@dataclass(frozen=True)
class Baseline:
    """What of the method a row goes without.

    Attributes:
        norm_step: of the norm-fed linears: one a `channel` (the paper); one for the whole `tensor`;
            one for the tensor after its channels were evened out as SmoothQuant does, `smooth`
            (Tables 1 and 4).
        middle: of the norm-fed channels with zero points: between the `ends` that the clip search
            leaves; or the mean over windows of the middle between a window's, `windows`, as
            OutlierTune's symmetrization has it.
        tensor_mix: o and down have one static step for the tensor (Tables 1 and 4).
        kept_weights: weights stay in floating point (Table 7).
    """

    norm_step: Literal["channel", "tensor", "smooth"] = "channel"
    middle: Literal["ends", "windows"] = "ends"
    tensor_mix: bool = False
    kept_weights: bool = False

    @property
    def exported(self) -> bool:
        """Whether `quantize` makes the row; else it runs in the reference engine alone."""
        own = self.norm_step != "channel" or self.middle != "ends"
        return not (own or self.tensor_mix or self.kept_weights)

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
        if isinstance(source, StaticInputPlan):
            fields = {x.name: getattr(source, x.name) for x in dataclasses.fields(source)}
            if self.middle == "windows":
                source = WindowMiddlesPlan(**fields)
            elif self.norm_step != "channel":
                source = OneStepPlan(**fields, smooth=self.norm_step == "smooth")
        if self.kept_weights:
            weights = dict.fromkeys(weights)
        return replace(readers, input=source, weights=weights)


PLAIN: Final = Baseline()


@dataclass(frozen=True)
class OneStepPlan(StaticInputPlan):
    """One static step for all channels behind a norm; nothing is clipped.

    Attributes:
        smooth: the channels are evened out first, as SmoothQuant does.
    """

    smooth: bool = False

    def unclipped_steps(self, spans: ChannelRange, weights: Tensor) -> Tensor:
        """Equal steps, or those that even the channels out and then are equal: float64 [n]."""
        if self.smooth:
            return smooth_steps(spans.extent, weights.abs().amax(dim=0), self.bits)
        return tensor_steps(spans.extent, self.bits)


class _AboutMiddle(ChannelRange):
    """Codes that reach as far below a middle as above it."""

    def shift(self, step: Tensor) -> Tensor | None:
        """The middle: [n]."""
        assert self.middle is not None
        return self.middle.to(step.dtype)


@dataclass(frozen=True)
class WindowMiddlesPlan(StaticInputPlan):
    """Symmetrization as OutlierTune (arXiv 2406.18832) has it; nothing is clipped."""

    def span(
        self, magnitudes: ChannelMagnitudes, inputs: Sequence[Tensor], length: int
    ) -> ChannelRange:
        """z_k: the mean over windows of (max + min) / 2; the extent: max |X_k - z_k|."""
        windows = torch.cat([x.reshape(-1, length, x.shape[-1]) for x in inputs])
        middle = ((windows.amax(dim=1) + windows.amin(dim=1)) / 2).mean(dim=0)
        extent = torch.maximum(magnitudes.highest - middle, middle - magnitudes.lowest)
        return _AboutMiddle(extent, largest_code(self.bits), middle)


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
        inputs = block.inputs_of(linears[0], batches)
        magnitudes = ChannelMagnitudes.of(self.rotation(x) for x in inputs)
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

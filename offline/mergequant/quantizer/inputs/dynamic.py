"""The input of o and down, and of every linear of the dynamic baseline: a step per token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mergequant.methods.clip import choose_token_clip
from mergequant.methods.rotate import OnlineRotation
from mergequant.model.block import Block
from mergequant.quantizer.inputs.record import CalibratedInput, ClipSearch, stacked_weights
from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.token_quant.reference import token_codes
from mergequant_vllm.rounding import SMALLEST_STEP, largest_code, smallest_code


@dataclass(frozen=True)
class DynamicInputPlan:
    """How a per-token input is to be calibrated: one clip ratio (paper 4.2).

    Attributes:
        bits: width of an activation code.
        zero_points: tokens have zero points.
        clip: None: nothing is clipped.
        rotation: of the input, by the server.
    """

    bits: int
    zero_points: bool
    clip: ClipSearch | None
    rotation: OnlineRotation
    kind: str = "dynamic"

    def calibrate(
        self, block: Block, linears: Sequence[str], batches: Sequence[Tensor]
    ) -> tuple[CalibratedInput, list[Tensor]]:
        """Search the ratio of least error at the linears' output."""
        inputs = block.inputs_of(linears[0], batches)
        ratio = 1.0
        if self.clip is not None:
            # The weights of such a linear were rotated as they were read; its float input is not.
            ratio = choose_token_clip(
                [self.rotation(x) for x in inputs],
                stacked_weights(block, linears),
                self.clip.grid(),
                self.bits,
                zero_points=self.zero_points,
            )
        clip = torch.tensor([ratio], dtype=torch.float32, device=block.device)
        report = {"clip": round(float(clip), 4)}
        return DynamicInput(self.bits, self.zero_points, clip, self.rotation, report), inputs


@dataclass(frozen=True)
class DynamicInput:
    """An input that the server quantizes token by token.

    Attributes:
        bits: width of an activation code.
        zero_points: tokens have zero points.
        clip: float32 [1], ratio of the per-token step.
        rotation: of the input, by the server.
        report: fields of the report.
    """

    bits: int
    zero_points: bool
    clip: Tensor
    rotation: OnlineRotation
    report: Mapping[str, Any]
    norm_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    is_served: bool = True

    def dequantized(self, x: Tensor) -> Tensor:
        """What the codes of x [..., K] and its tokens' steps stand for: float32 [..., K]."""
        codes, step, zero = token_codes(
            self.rotation(x), self.clip, self.bits, CodeLayout.FLOAT32, zero_points=self.zero_points
        )
        return (codes if zero is None else codes - zero) * step

    def unrounded(self, x: Tensor) -> Tensor:
        """x [..., K] rotated: float32 [..., K]."""
        return self.rotation(x)

    def relaxed(self, x: Tensor) -> Tensor:
        """x [..., K] rotated and clamped to what its codes reach: float32 [..., K]."""
        z = self.unrounded(x)
        exact = z.detach()
        if self.zero_points:
            low = exact.amin(dim=-1, keepdim=True).clamp(max=0.0)
            high = exact.amax(dim=-1, keepdim=True).clamp(min=0.0)
            return z.clamp(low * self.clip, high * self.clip)
        largest = exact.abs().amax(dim=-1, keepdim=True)
        step = (largest * self.clip / largest_code(self.bits)).clamp(min=SMALLEST_STEP)
        return z.clamp(smallest_code(self.bits) * step, largest_code(self.bits) * step)

    def folded_weight(self, weight: Tensor) -> Tensor:
        """The weight as it is: nothing migrates."""
        return weight

    def output_offset(self, weight: Tensor) -> Tensor | None:
        """Return None: the server takes a token's zero point away by itself."""
        return None

    def stored(self) -> dict[str, Tensor]:
        """`input_clip`."""
        return {"input_clip": self.clip.cpu().clone()}

"""What became of one linear: its codes, what is stored of it, and its line of the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mergequant.layers.served_linear import stored_steps
from mergequant.methods.weights import WeightGrid
from mergequant.quantizer.inputs.record import CalibratedInput


@dataclass(frozen=True)
class Rounding:
    """How a linear's codes came about.

    Attributes:
        grid: steps and zero points.
        codes: int8 [out, K].
        working: float32 [out, K], whose nearest codes are `codes`; only for the compensation.
        trainable: bool [out, K], see `trained_weight`; only for the compensation.
    """

    grid: WeightGrid
    codes: Tensor
    working: Tensor | None = None
    trainable: Tensor | None = None


@dataclass
class ReportLine:
    """One line of `quantization_report.jsonl`.

    Attributes:
        linear: full name.
        activations: `static` or `dynamic`.
        input: fields that the linears of one input share, such as its clip ratio.
        loss: relative squared error at the linear's output, of the codes that it began with.
        loss_rtn: the same of codes rounded to nearest; None: the weight is not rounded.
        loss_gptq: the same of GPTQ's codes; None: there are none.
        loss_held_out: `loss` on tokens of the calibration text that no weight was fitted to; None:
            there are none. Much more than `loss`: too little text for so many channels.
        damping: of the Hessian, as a fraction of its mean diagonal; None: none was inverted.
        seconds: by step.
        compensation: of the block, in the line of its first linear; None: nothing was trained.
    """

    linear: str
    activations: str
    input: dict[str, Any]
    loss: float = 0.0
    loss_rtn: float | None = None
    loss_gptq: float | None = None
    loss_held_out: float | None = None
    damping: float | None = None
    seconds: dict[str, float] = field(
        default_factory=lambda: {"calibration": 0.0, "codes": 0.0, "compensation": 0.0}
    )
    compensation: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the line as the report's file has it."""
        line = {
            "linear": self.linear,
            "activations": self.activations,
            **self.input,
            "loss_rtn": self.loss_rtn,
            "loss_gptq": self.loss_gptq,
            "loss_held_out": self.loss_held_out,
            "damping": self.damping,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }
        if self.compensation is not None:
            line["compensation"] = dict(self.compensation)
        return line


@dataclass(frozen=True)
class LinearResult:
    """One quantized linear.

    Attributes:
        name: within the block.
        line: of the report.
        source: how it reads its input.
        weight: float32 [out, K] where it stays in floating point; None where there are codes.
        output_offset: float32 [out]; None where no constant is added.
        rounding: the codes and what they came from; None if the weight stays as it is.
    """

    name: str
    line: ReportLine
    source: CalibratedInput
    weight: Tensor | None
    output_offset: Tensor | None
    rounding: Rounding | None

    @property
    def codes(self) -> Tensor:
        """int8 [out, K]."""
        assert self.rounding is not None
        return self.rounding.codes

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores of the linear beside codes and bias, by suffix."""
        assert self.rounding is not None
        tensors = {**stored_steps(self.rounding.grid), **self.source.stored()}
        if self.output_offset is not None:
            tensors["output_offset"] = self.output_offset.cpu().clone()
        return tensors

    def floating_weight(self) -> Tensor:
        """What the product multiplies by: float32 [out, K]."""
        if self.weight is not None:
            return self.weight
        assert self.rounding is not None
        return self.rounding.grid.dequantize(self.rounding.codes).to(torch.float32)

    def with_codes(self, codes: Tensor) -> "LinearResult":
        """The same linear with other codes, int8 [out, K]."""
        assert self.rounding is not None
        return replace(self, rounding=Rounding(self.rounding.grid, codes))


def report_lines(
    results: Sequence[LinearResult], outliers: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A block's lines of the report.

    Args:
        outliers: see `Channels.outliers`.
    """
    lines = [result.line.as_json() for result in results]
    for line in lines:
        source = outliers.get(line["linear"])
        if source is not None and "outliers" in line:
            line["outliers"] = {"source": round(source, 2), **line["outliers"]}
    return lines

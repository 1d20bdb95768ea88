"""Compensation: the stored codes are q(W + D), where D is trained through q.

In the paper (4.3) D is a product A B of low rank; or each element of D is trained by itself, as
methods that learn to round do (AdaRound, Nagel et al., 2020; AutoRound, Cheng et al., 2024).

W is GPTQ's working weight, so that training begins at GPTQ's own codes; steps and zero points stay
those that GPTQ rounded with. GPTQ after the training, the other reading of the paper, undoes it:
it brings the product back to that of W + D, which was never what the training made good.

D is counted in weight steps: dW = step * D, so that one learning rate serves any layer.
"""

import math
from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn

from mergequant_vllm.rounding import largest_code, round_to_codes, smallest_code


class Grid(Protocol):
    """The values a weight can be rounded to, step * (code - zero point); see `weights`."""

    @property
    def bits(self) -> int:
        """Width of a code."""

    @property
    def runs(self) -> tuple[int, ...]:
        """Lengths of the runs of columns that share a step."""

    def columns(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Step and zero point of the columns `numbers`, int64 [m]: each [out, m]."""


def straight_through(exact: Tensor, relaxed: Tensor) -> Tensor:
    """`exact` going forward, the gradient of `relaxed` going back (Bengio et al., 2013)."""
    return relaxed + (exact - relaxed).detach()


class TrainedWeight(nn.Module, ABC):
    """A weight as the server will multiply by it, with D to train.

    Args:
        working: [out, K], whose nearest codes are the ones to begin with.
        trainable: bool [out, K], see `trainable_elements`.
        grid: steps and zero points.
    """

    working: Tensor
    step: Tensor
    zero: Tensor
    trainable: Tensor

    def __init__(self, working: Tensor, trainable: Tensor, grid: Grid) -> None:
        super().__init__()
        self.bits = grid.bits
        step, zero = grid.columns(torch.arange(working.shape[1], device=working.device))
        if len(grid.runs) == 1:  # a column is enough
            step, zero = step[:, :1], zero[:, :1]
        self.register_buffer("working", working.to(torch.float32))
        self.register_buffer("step", step.to(torch.float32))
        self.register_buffer("zero", zero.to(torch.float32))
        self.register_buffer("trainable", trainable)

    @abstractmethod
    def added(self) -> Tensor:
        """D, in weight steps: float32 [out, K]; 0 before it is trained."""

    def merged(self) -> Tensor:
        """W + D: float32 [out, K]."""
        return self.working + self.step * (self.added() * self.trainable)

    def forward(self) -> Tensor:
        """What the codes of `merged` stand for: float32 [out, K], differentiable."""
        scaled = self._scaled()
        relaxed = scaled.clamp(smallest_code(self.bits), largest_code(self.bits))
        codes = straight_through(round_to_codes(scaled.detach(), self.bits), relaxed)
        return (codes - self.zero) * self.step

    def codes(self) -> Tensor:
        """int8 [out, K]: what `forward` multiplies by, to be stored."""
        return round_to_codes(self._scaled().detach(), self.bits).to(torch.int8)

    def _scaled(self) -> Tensor:
        """Codes before they are rounded."""
        return self.merged() / self.step + self.zero


class LowRankWeight(TrainedWeight):
    """D = A B (paper 4.3).

    B begins at 0 and A random: a column whose channel never fires has no gradient and stays as it
    is.

    Args:
        rank: r.
        generator: draws A; on the CPU, so that every device draws the same.

    Attributes:
        a: [out, r].
        b: [r, K].
    """

    def __init__(
        self,
        working: Tensor,
        trainable: Tensor,
        grid: Grid,
        rank: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(working, trainable, grid)
        out_features, in_features = working.shape
        a = torch.randn(out_features, rank, generator=generator) / math.sqrt(rank)
        self.a = nn.Parameter(a.to(working.device))
        self.b = nn.Parameter(torch.zeros(rank, in_features, device=working.device))

    def added(self) -> Tensor:
        """A B."""
        return self.a @ self.b


class ElementwiseWeight(TrainedWeight):
    """D of which each element is trained by itself.

    Attributes:
        d: [out, K].
    """

    def __init__(self, working: Tensor, trainable: Tensor, grid: Grid) -> None:
        super().__init__(working, trainable, grid)
        self.d = nn.Parameter(torch.zeros_like(self.working))

    def added(self) -> Tensor:
        """D."""
        return self.d


def trainable_elements(weight: Tensor, grid: Grid) -> Tensor:
    """What the compensation may change of a weight [out, K], not yet rounded: bool [out, K].

    Not what holds nothing but zeros: a row or group of them, whose step is arbitrary, and a column
    of them, which is padding or of a dead channel.
    """
    nonzero = weight != 0
    groups = [
        part.any(dim=1, keepdim=True).expand_as(part)
        for part in torch.split(nonzero, list(grid.runs), dim=1)
    ]
    return torch.cat(groups, dim=1) & nonzero.any(dim=0)

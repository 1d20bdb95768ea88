"""What a linear asks of a kernel, and what a kernel offers."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearSpec:
    """One linear as it stands on one tensor-parallel rank.

    Attributes:
        in_features: K on this rank.
        out_features: N on this rank, merged linears together.
        dynamic: activations have a step per token.
        device: torch device type, `cpu` or `cuda`.
        dtype: the model's, which the output has.
    """

    in_features: int
    out_features: int
    weight_bits: int
    activation_bits: int
    dynamic: bool
    device: str
    dtype: torch.dtype


class LinearKernel(Protocol):
    """An implementation of the INT4 linear that equals `reference.py`.

    Attributes:
        name: how users ask for it.
        code_dtype: dtype in which it takes activation codes.
    """

    name: str
    code_dtype: torch.dtype

    def refusal(self, spec: LinearSpec) -> str | None:
        """Why this kernel cannot serve `spec`, as a sentence; None if it can."""

    def prepare(self, weight_packed: Tensor, spec: LinearSpec) -> Tensor:
        """Stored layout (int32 [N, words]) to this kernel's own, once, after loading."""

    def linear(
        self,
        codes: Tensor,
        weight: Tensor,
        weight_step: Tensor,
        token_step: Tensor | None,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """Codes [..., K] in `code_dtype`, prepared weight, float32 steps [N] and [..., 1]."""

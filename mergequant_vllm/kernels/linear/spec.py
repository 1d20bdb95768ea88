"""What a linear asks of a kernel, and what a kernel offers."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mergequant_vllm.kernels.capability import spell
from mergequant_vllm.kernels.codes import CodeLayout, Writer


@dataclass(frozen=True)
class LinearSpec:
    """One linear as it stands on one tensor-parallel rank.

    Attributes:
        in_features: K on this rank, after reconstruction.
        out_features: N on this rank, merged linears together.
        weight_bits: 3, 4 or 8.
        activation_bits: 4 or 8.
        dynamic: activations have a step per token.
        device: torch device type, `cpu` or `cuda`.
        dtype: the model's, which the output has.
        group_size: input channels that share a weight step; None: one step per output channel.
        zero_points: weight codes have zero points.
        capability: compute capability of the GPU, see `kernels.capability`; None on CPUs.
    """

    in_features: int
    out_features: int
    weight_bits: int
    activation_bits: int
    dynamic: bool
    device: str
    dtype: torch.dtype
    group_size: int | None = None
    zero_points: bool = False
    capability: int | None = None

    def __str__(self) -> str:
        """As users read it in a refusal."""
        weights = f"W{self.weight_bits}"
        if self.group_size is not None:
            weights += f" in groups of {self.group_size}"
        if self.zero_points:
            weights += " asymmetric"
        kind = "per token" if self.dynamic else "static"
        return (
            f"a linear of {self.out_features} x {self.in_features}, {weights}, "
            f"A{self.activation_bits} {kind}, {self.dtype_name}, {self.where}"
        )

    @property
    def where(self) -> str:
        """The device as users read it: "cuda 9.0"."""
        if self.capability is None:
            return self.device
        return f"{self.device} {spell(self.capability)}"

    @property
    def dtype_name(self) -> str:
        """`dtype` as users read it: "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def groups(self) -> int:
        """Weight steps of an output channel; the last group may be short."""
        return 1 if self.group_size is None else -(-self.in_features // self.group_size)


@dataclass(frozen=True)
class StoredLinear:
    """One linear in the checkpoint's layout, on the device it will run on.

    Attributes:
        weight_packed: int32 [N, words], see `packing`.
        weight_step: float32 [N, groups]; the stored values are exact in bfloat16 and float16.
        zero_points: int8 [N, groups], in the range of the weight's codes, or None.
        bias: [N] in the model's dtype, or None.
    """

    weight_packed: Tensor
    weight_step: Tensor
    zero_points: Tensor | None = None
    bias: Tensor | None = None


class PreparedLinear(nn.Module):
    """One linear in its kernel's own layout, made once after loading.

    Attributes:
        columns: length of the rows of codes that `forward` takes: K, or K padded with codes 0.
    """

    columns: int

    def forward(self, codes: Tensor, token_step: Tensor | None, add_bias: bool) -> Tensor:
        """The product (definition: `reference.py`).

        Args:
            codes: [..., columns] in the kernel's `layout`.
            token_step: float32 [..., 1], or None if the spec is not dynamic.
            add_bias: add the bias that was prepared.

        Returns:
            [..., N] in the spec's dtype.
        """
        raise NotImplementedError


class LinearKernel(Protocol):
    """An implementation of the INT4 linear that equals `reference.py`.

    Attributes:
        name: how users ask for it.
        layout: how it takes activation codes.
        writer: whose code writes them.
    """

    name: str
    layout: CodeLayout
    writer: Writer

    def refusal(self, spec: LinearSpec) -> str | None:
        """Why this kernel cannot serve `spec`, as a clause; None if it can."""

    def prepare(self, stored: StoredLinear, spec: LinearSpec) -> PreparedLinear:
        """Stored layout to this kernel's own; takes no spec that it refuses."""

"""What a linear asks of a kernel, and what a kernel offers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mergequant_vllm.kernels.capability import spell
from mergequant_vllm.kernels.codes import CodeLayout, CodeWriter
from mergequant_vllm.kernels.linear.constant import constant_of
from mergequant_vllm.kernels.linear.spans import span_slices


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
        segments: lengths of the runs of input channels that share a weight step, where these are
            not equal groups; they add up to K, and all but the last are multiples of 32.
        token_zero_points: activations have a zero point per token beside their step.

    Raises:
        ValueError: segments are wrong, or static activations have zero points.
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
    segments: tuple[int, ...] | None = None
    token_zero_points: bool = False

    def __post_init__(self) -> None:
        """Refuse what no checkpoint stores."""
        if self.token_zero_points and not self.dynamic:
            raise ValueError("static activations have no zero points per token")
        _ = self.spans

    def __str__(self) -> str:
        """Return the linear as users read it in a refusal."""
        weights = f"W{self.weight_bits}"
        if self.group_size is not None:
            weights += f" in groups of {self.group_size}"
        if self.segments is not None:
            weights += f" in {self.groups} segments"
        if self.zero_points:
            weights += " asymmetric"
        kind = "per token" if self.dynamic else "static"
        if self.token_zero_points:
            kind += ", asymmetric"
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
    def spans(self) -> list[slice] | None:
        """Columns of each weight step, see `spans`; None: one step per output channel."""
        return span_slices(self.in_features, self.group_size, self.segments)

    @property
    def groups(self) -> int:
        """Weight steps of an output channel: groups, segments, or 1."""
        return len(self.spans or (None,))

    @property
    def longest_span(self) -> int:
        """Most columns whose products are summed as integers."""
        spans = self.spans or [slice(0, self.in_features)]
        return max(int(span.stop - span.start) for span in spans)


@dataclass(frozen=True)
class StoredLinear:
    """One linear in the checkpoint's layout, on the device it will run on.

    Attributes:
        weight_packed: int32 [N, words], see `packing`.
        weight_step: float32 [N, groups]; the stored values are exact in bfloat16 and float16.
        zero_points: int8 [N, groups], in the range of the weight's codes, or None.
        bias: [N] in the model's dtype, or None.
        output_offset: float32 or bfloat16 [N], always added, with the bias and without it; or None.
    """

    weight_packed: Tensor
    weight_step: Tensor
    zero_points: Tensor | None = None
    bias: Tensor | None = None
    output_offset: Tensor | None = None

    def constant(self, add_bias: bool) -> Tensor | None:
        """Return what is added to every token's outputs: float32 [N], or None for nothing."""
        return constant_of(self.bias if add_bias else None, self.output_offset)


class PreparedLinear(nn.Module):
    """One linear in its kernel's own layout, made once after loading.

    Attributes:
        columns: length of the rows of codes that `forward` takes: K, or K padded with codes 0.
        constant_with_bias: `StoredLinear.constant(True)` as the kernel takes it.
        constant_without_bias: `StoredLinear.constant(False)`, likewise.
    """

    columns: int
    constant_with_bias: Tensor | None
    constant_without_bias: Tensor | None

    def keep_constants(
        self, stored: StoredLinear, lay_out: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Register both constants, each in the kernel's layout, which `lay_out` makes of [N]."""
        for name, add_bias in (("constant_with_bias", True), ("constant_without_bias", False)):
            constant = stored.constant(add_bias)
            if constant is not None and lay_out is not None:
                constant = lay_out(constant)
            self.register_buffer(name, constant)

    def constant(self, add_bias: bool) -> Tensor | None:
        """Return the constant to add, with the bias or without it; None: nothing."""
        return self.constant_with_bias if add_bias else self.constant_without_bias

    def forward(
        self, codes: Tensor, token_step: Tensor | None, token_zero: Tensor | None, add_bias: bool
    ) -> Tensor:
        """The product (definition: `reference.py`).

        Args:
            codes: [..., columns] in the kernel's `layout`.
            token_step: float32 [..., 1], or None if the spec is not dynamic.
            token_zero: int32 [..., 1], or None if the spec has no zero points per token.
            add_bias: add the bias that was prepared; the output offset is added in any case.

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
    writer: CodeWriter

    def refusal(self, spec: LinearSpec) -> str | None:
        """Why this kernel cannot serve `spec`, as a clause; None if it can."""

    def prepare(self, stored: StoredLinear, spec: LinearSpec) -> PreparedLinear:
        """Stored layout to this kernel's own; takes no spec that it refuses."""

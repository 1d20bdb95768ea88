"""Which code turns activations into codes, decided per call by who compiles.

| where                           | static              | per token           | rotated or with   |
|                                 |                     |                     | zero points       |
|---------------------------------|---------------------|---------------------|-------------------|
| GPU under torch.compile         | `norm_round.fused`  | `token_quant.fused` | `.triton`         |
| GPU, eager                      | `norm_round.triton` | `token_quant.triton`| `.triton`         |
| CPU `cpu-int4`, torch.compile   | `reference`         | `token_quant.cpu`   | `.cpu`            |
| CPU `cpu-int4`, eager           | `norm_round.cpu`    | `token_quant.cpu`   | `.cpu`            |
| kernel `cpu-fp32`, `reference`  | `reference`         | `reference`         | `reference`; with |
|                                 |                     |                     | zero points under |
|                                 |                     |                     | torch.compile     |
|                                 |                     |                     | `.fused`          |

Under torch.compile the compiler puts gather, round, clamp and packing into the loop of the norm
(or of the activation function) in front; in eager mode each is one kernel. With zero points the
codes come from an operator that no compiler looks into, since it would contract a product and a sum
of the definition. Where heads are mixed, that comes first: `hadamard.cpu` for kernel `cpu-int4`,
else `hadamard.operator`.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from mergequant_vllm.kernels.codes import CodeLayout, CodeWriter
from mergequant_vllm.kernels.hadamard.cpu import mix_heads_native
from mergequant_vllm.kernels.hadamard.operator import mix_heads_opaque
from mergequant_vllm.kernels.linear.spec import LinearKernel, LinearSpec
from mergequant_vllm.kernels.norm_round import cpu as norm_round_native
from mergequant_vllm.kernels.norm_round import fused as norm_round_fused
from mergequant_vllm.kernels.norm_round import reference as norm_round
from mergequant_vllm.kernels.norm_round import triton as norm_round_triton
from mergequant_vllm.kernels.token_quant import cpu as token_quant_native
from mergequant_vllm.kernels.token_quant import fused as token_quant_fused
from mergequant_vllm.kernels.token_quant import reference as token_quant
from mergequant_vllm.kernels.token_quant import triton as token_quant_triton
from mergequant_vllm.kernels.triton_mode import interpreted


@dataclass(frozen=True)
class CodeForm:
    """The codes that a linear's kernel takes.

    Attributes:
        bits: width of an activation code.
        layout: how they are laid out.
        columns: length of a row; codes beyond the linear's K are 0.
        writer: which forms of the quantizers write them.
    """

    bits: int
    layout: CodeLayout
    columns: int
    writer: CodeWriter


def writer_for(spec: LinearSpec, kernel: LinearKernel) -> CodeWriter:
    """The kernel's, but Triton's forms of the quantizers need a GPU or their interpreter."""
    if kernel.writer is CodeWriter.GPU and spec.device != "cuda" and not interpreted():
        return CodeWriter.REFERENCE
    return kernel.writer


class StaticQuantizer(nn.Module):
    """Rounds a migrated norm's output (definition: `norm_round.reference`).

    Args:
        channels: n, width of the norm's output.
        index: int32 [K] or None.
        offset: float32 [K] or None.
        device: where the codes are made.
    """

    index: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        form: CodeForm,
        channels: int,
        index: Tensor | None,
        offset: Tensor | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("index", index)
        self.register_buffer("offset", offset)
        slabs: list[norm_round_fused.Slab] = []
        if form.writer is CodeWriter.GPU:
            slabs = norm_round_fused.plan_slabs(channels, form.layout, index, offset, form.columns)
        self.slabs = len(slabs)
        for number, slab in enumerate(slabs):
            for name, tensor in vars(slab).items():
                there = None if tensor is None else tensor.to(device)
                self.register_buffer(f"slab_{number}_{name}", there)

    def forward(self, x: Tensor) -> tuple[Tensor, None, None]:
        """x [..., n] to codes [..., columns]; no step and no zero point."""
        form = self.form
        compiling = torch.compiler.is_compiling()
        if form.writer is CodeWriter.GPU and compiling:
            codes = norm_round_fused.static_codes(
                x, form.bits, form.layout, self._slabs(), form.columns
            )
            return codes, None, None
        source: ModuleType = norm_round
        if form.writer is CodeWriter.GPU:
            source = norm_round_triton
        elif form.writer is CodeWriter.NATIVE and not compiling:
            source = norm_round_native
        codes = source.static_codes(
            x,
            form.bits,
            form.layout,
            index=self.index,
            offset=self.offset,
            columns=form.columns,
        )
        return codes, None, None

    def _slabs(self) -> list[norm_round_fused.Slab]:
        names = ("channel", "offset", "mask")
        return [
            norm_round_fused.Slab(*(getattr(self, f"slab_{number}_{name}") for name in names))
            for number in range(self.slabs)
        ]


class TokenQuantizer(nn.Module):
    """Quantizes each token with its own step (definition: `token_quant.reference`).

    Args:
        clip: float32 [1].
        hadamard: block of the rotation, or None.
        zero_points: codes have a zero point per token.
        heads: heads of the input and their width, where they are mixed first (definition:
            `hadamard.reference.mix_heads`); None: they are not.

    Raises:
        ValueError: a number of heads or a width is below 1.
    """

    clip: Tensor

    def __init__(
        self,
        form: CodeForm,
        clip: Tensor,
        hadamard: int | None,
        zero_points: bool = False,
        heads: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if heads is not None and min(heads) < 1:
            raise ValueError(f"{heads[0]} heads of {heads[1]} channels cannot be mixed")
        self.heads = heads
        self.form = form
        self.hadamard = hadamard
        self.zero_points = zero_points
        self.register_buffer("clip", clip)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [..., K] to codes [..., columns], steps float32 [..., 1] and zeros int32 or None."""
        form = self.form
        x = self.mixed(x)
        codes, step, zero = self._source().token_codes(
            x,
            self.clip,
            form.bits,
            form.layout,
            hadamard=self.hadamard,
            columns=form.columns,
            zero_points=self.zero_points,
        )
        return codes, step, zero

    def mixed(self, x: Tensor) -> Tensor:
        """x [..., K], its heads mixed where they are to be."""
        if self.heads is None:
            return x
        native = self.form.writer is CodeWriter.NATIVE
        y: Tensor = (mix_heads_native if native else mix_heads_opaque)(x, *self.heads)
        return y

    def _source(self) -> ModuleType:
        """Return the module of the table's row and column."""
        writer, compiling = self.form.writer, torch.compiler.is_compiling()
        if writer is CodeWriter.NATIVE:
            return token_quant_native
        if writer is CodeWriter.GPU:
            fuses = compiling and self.hadamard is None and not self.zero_points
            return token_quant_fused if fuses else token_quant_triton
        return token_quant_fused if compiling and self.zero_points else token_quant

"""A linear as the server computes it: the oracle's module, and the calibrated block's.

Made of the reference operations; the integer sums go through float GEMMs in which they are exact.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mergequant.methods.weights import WeightGrid
from mergequant_vllm.format import LinearFormat
from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.linear.reference import centre, integer_linear
from mergequant_vllm.kernels.linear.spans import span_slices
from mergequant_vllm.kernels.norm_round.reference import static_codes
from mergequant_vllm.kernels.token_quant.reference import token_codes
from mergequant_vllm.packing import pack, unpack

_FLOAT32_EXACT_BELOW = 2**24


class QuantizedLinear(nn.Module):
    """y = (x_int @ (W_int - z)^T) * token_step * weight_step + b, as `form` says.

    Args:
        form: how the linear is stored and what its activations are.
        codes: int8 [out, K], weight codes.
        weight_step: [out, groups].
        zero_points: int8 [out, groups]; needed if `form` has zero points.
        bias: [out] or None.
        clip: [1], ratio of the per-token step; needed if activations are dynamic.
        index: int32 [K], gather of the input's channels, or None.
        offset: float32 [K], rounding offsets, or None.
        ranks: tensor-parallel size of a row-parallel linear: each shard of the input has its own
            step, and the shards' outputs are added in the output's dtype.
    """

    weight: Tensor
    weight_step: Tensor
    clip: Tensor | None
    index: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        form: LinearFormat,
        codes: Tensor,
        weight_step: Tensor,
        *,
        zero_points: Tensor | None = None,
        bias: Tensor | None = None,
        clip: Tensor | None = None,
        index: Tensor | None = None,
        offset: Tensor | None = None,
        ranks: int = 1,
    ) -> None:
        super().__init__()
        self.form = form
        self.ranks = ranks
        spans = span_slices(codes.shape[1], form.group_size, None)
        weight = centre(codes, zero_points, spans).to(torch.float64)
        self.register_buffer("weight", weight.to(_exact_dtype(form, weight)))
        self.register_buffer("weight_step", weight_step.to(torch.float32))
        self.register_buffer("clip", None if clip is None else clip.to(torch.float32).reshape(1))
        self.register_buffer("index", index)
        self.register_buffer("offset", offset)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def input_codes(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes float32 of an input [..., in] and, if dynamic, steps [..., 1]."""
        bits, layout = self.form.activation_bits, CodeLayout.FLOAT32
        if self.clip is None:
            return static_codes(x, bits, layout, index=self.index, offset=self.offset), None
        form = self.form
        codes, step, _ = token_codes(x, self.clip, bits, layout, hadamard=form.hadamard)
        return codes, step

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to y [..., out], same dtype."""
        outputs = list(self._shard_outputs(x))
        total = outputs[0]
        for y in outputs[1:]:
            total = total + y
        return total

    def _shard_outputs(self, x: Tensor) -> Iterator[Tensor]:
        size = self.form.group_size
        groups = self.weight_step.shape[1] // self.ranks
        for rank, shard in enumerate(x.chunk(self.ranks, -1)):
            codes, token_step = self.input_codes(shard)
            codes = codes.to(self.weight.dtype)
            columns = codes.shape[-1]
            weight = self.weight[:, rank * columns : (rank + 1) * columns]
            step = self.weight_step
            if size is not None:
                step = step[:, rank * groups : (rank + 1) * groups]
            spans = span_slices(columns, size, None)
            bias = self.bias.to(torch.float32) if rank == 0 and self.bias is not None else None
            yield integer_linear(
                codes, weight, step, spans, token_step, None, bias, x.dtype, F.linear
            )


def from_stored(
    form: LinearFormat, read: Callable[[str], Tensor], dtype: torch.dtype, ranks: int = 1
) -> QuantizedLinear:
    """The module of a linear as a checkpoint stores it.

    Args:
        read: the stored tensor of a suffix, such as `weight_packed`.
        dtype: of the bias.
        ranks: see `QuantizedLinear`.
    """
    return QuantizedLinear(
        form,
        unpack(read("weight_packed"), form.weight_bits, form.in_features),
        read("weight_scale"),
        zero_points=read("weight_zero_point") if form.zero_points else None,
        bias=read("bias").to(dtype) if form.bias else None,
        clip=read("input_clip") if form.activations == "dynamic" else None,
        index=read("input_index") if form.columns is not None else None,
        offset=read("input_offset") if form.offsets else None,
        ranks=ranks,
    )


def stored_weight(codes: Tensor, grid: WeightGrid) -> dict[str, Tensor]:
    """What a checkpoint stores of a weight, by suffix: codes int8 [out, K] and their grid."""
    tensors = {
        "weight_packed": pack(codes.cpu(), grid.bits),
        "weight_scale": grid.step.to(torch.bfloat16).cpu(),
    }
    if grid.zero_points is not None:
        tensors["weight_zero_point"] = grid.zero_points.cpu()
    return tensors


def _exact_dtype(form: LinearFormat, weight: Tensor) -> torch.dtype:
    """float32 where no sum of products can reach 2^24, else float64."""
    largest = float(weight.abs().amax()) if weight.numel() else 0.0
    longest = weight.shape[1] * largest * 2 ** (form.activation_bits - 1)
    return torch.float32 if longest <= _FLOAT32_EXACT_BELOW else torch.float64

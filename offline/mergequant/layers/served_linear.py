"""A linear as the server computes it: the reference forward's module, and the calibrated block's.

Made of the reference operations; the integer sums go through float GEMMs in which they are exact.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mergequant.methods.weights import WeightGrid
from mergequant_vllm.format import LinearFormat
from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.hadamard.reference import mix_heads
from mergequant_vllm.kernels.linear.constant import constant_of
from mergequant_vllm.kernels.linear.reference import centre, integer_linear
from mergequant_vllm.kernels.linear.spans import span_slices
from mergequant_vllm.kernels.norm_round.reference import static_codes
from mergequant_vllm.kernels.token_quant.reference import token_codes
from mergequant_vllm.packing import pack, unpack
from mergequant_vllm.rounding import largest_magnitude

_FLOAT32_EXACT_BELOW = 2**24


@dataclass(frozen=True)
class Codes:
    """An input in codes.

    Attributes:
        codes: float32 [..., K], integer-valued.
        step: float32 [..., 1], or None if static.
        zero: int32 [..., 1], or None without zero points.
    """

    codes: Tensor
    step: Tensor | None = None
    zero: Tensor | None = None


class ServedLinear(nn.Module):
    """y = ((x_int - z_x) @ (W_int - z_w)^T) * token_step * weight_step + constant, as `form` says.

    Args:
        form: how the linear is stored and what its activations are.
        codes: int8 [out, K], weight codes.
        weight_step: [out, groups].
        zero_points: int8 [out, groups]; needed if the weight has zero points.
        bias: [out] or None.
        output_offset: [out], added whether there is a bias or not, or None.
        clip: [1], ratio of the per-token step; needed if activations are dynamic.
        index: int32 [K], gather of the input's channels, or None.
        offset: float32 [K], rounding offsets, or None.
        ranks: tensor-parallel size of a row-parallel linear: each shard of the input has its own
            step, and the shards' outputs are added in the output's dtype.
    """

    weight: Tensor
    weight_step: Tensor
    constant: Tensor | None
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
        output_offset: Tensor | None = None,
        clip: Tensor | None = None,
        index: Tensor | None = None,
        offset: Tensor | None = None,
        ranks: int = 1,
    ) -> None:
        super().__init__()
        self.form = form
        self.ranks = ranks
        spans = span_slices(codes.shape[1], form.weight.group_size, form.weight.segments)
        weight = centre(codes, zero_points, spans).to(torch.float64)
        longest = weight.shape[1] if spans is None else max(x.stop - x.start for x in spans)
        self.register_buffer("weight", weight.to(_exact_dtype(form, weight, longest)))
        self.register_buffer("weight_step", weight_step.to(torch.float32))
        self.register_buffer("constant", constant_of(bias, output_offset))
        self.register_buffer("clip", None if clip is None else clip.to(torch.float32).reshape(1))
        self.register_buffer("index", index)
        self.register_buffer("offset", offset)

    def input_codes(self, x: Tensor) -> Codes:
        """Codes of an input [..., in]."""
        bits, layout = self.form.input.bits, CodeLayout.FLOAT32
        dynamic = self.form.dynamic
        if dynamic is None:
            return Codes(static_codes(x, bits, layout, index=self.index, offset=self.offset))
        assert self.clip is not None
        if dynamic.heads is not None:
            x = mix_heads(x.to(torch.float32), dynamic.heads)
        return Codes(
            *token_codes(
                x,
                self.clip,
                bits,
                layout,
                hadamard=dynamic.hadamard,
                zero_points=dynamic.zero_points,
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to y [..., out], same dtype."""
        outputs = list(self._shard_outputs(x))
        total = outputs[0]
        for y in outputs[1:]:
            total = total + y
        return total

    def _shard_outputs(self, x: Tensor) -> Iterator[Tensor]:
        size = self.form.weight.group_size
        groups = self.weight_step.shape[1] // self.ranks
        for rank, shard in enumerate(x.chunk(self.ranks, -1)):
            read = self.input_codes(shard)
            columns = read.codes.shape[-1]
            step = self.weight_step
            if size is not None:
                step = step[:, rank * groups : (rank + 1) * groups]
            yield integer_linear(
                read.codes.to(self.weight.dtype),
                self.weight[:, rank * columns : (rank + 1) * columns],
                step,
                span_slices(columns, size, self.form.weight.segments),
                read.step,
                read.zero,
                self.constant if rank == 0 else None,
                x.dtype,
                F.linear,
            )


def served_linear(
    form: LinearFormat,
    codes: Tensor,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    ranks: int = 1,
) -> ServedLinear:
    """The module of a linear whose codes are at hand.

    Args:
        codes: int8 [out, K].
        read: the stored tensor of a suffix, such as `weight_scale`.
        dtype: of the bias.
        ranks: see `ServedLinear`.
    """
    optional = stored_beside_codes(form, read)
    if optional["bias"] is not None:
        optional["bias"] = optional["bias"].to(dtype)
    return ServedLinear(form, codes, read("weight_scale"), **optional, ranks=ranks)


def stored_beside_codes(
    form: LinearFormat, read: Callable[[str], Tensor]
) -> dict[str, Tensor | None]:
    """What a linear of this form stores beside codes and weight steps, by the argument's name.

    Args:
        read: the stored tensor of a suffix, such as `input_clip`.
    """
    static = form.static
    suffixes = {
        "zero_points": ("weight_zero_point", form.weight.zero_points),
        "bias": ("bias", form.bias),
        "output_offset": ("output_offset", form.output_offset is not None),
        "clip": ("input_clip", static is None),
        "index": ("input_index", static is not None and static.columns is not None),
        "offset": ("input_offset", static is not None and static.offsets),
    }
    return {
        name: read(suffix) if is_there else None for name, (suffix, is_there) in suffixes.items()
    }


def from_stored(
    form: LinearFormat, read: Callable[[str], Tensor], dtype: torch.dtype, ranks: int = 1
) -> ServedLinear:
    """The module of a linear as a checkpoint stores it, see `served_linear`."""
    codes = unpack(read("weight_packed"), form.weight.bits, form.in_features)
    return served_linear(form, codes, read, dtype, ranks)


def stored_weight(codes: Tensor, grid: WeightGrid) -> dict[str, Tensor]:
    """What a checkpoint stores of a weight, by suffix: codes int8 [out, K] and their grid."""
    return {"weight_packed": pack(codes.cpu(), grid.bits), **stored_steps(grid)}


def stored_steps(grid: WeightGrid) -> dict[str, Tensor]:
    """What a checkpoint stores of a weight's steps and zero points, by suffix."""
    tensors = {"weight_scale": grid.step.to(torch.bfloat16).cpu()}
    if grid.zero_points is not None:
        tensors["weight_zero_point"] = grid.zero_points.cpu()
    return tensors


def _exact_dtype(form: LinearFormat, weight: Tensor, columns: int) -> torch.dtype:
    """float32 where no sum of so many `columns` can reach 2^24, else float64."""
    largest = float(weight.abs().amax()) if weight.numel() else 0.0
    token_zero_points = form.dynamic is not None and form.dynamic.zero_points
    code = largest_magnitude(form.input.bits, token_zero_points)
    return torch.float32 if columns * largest * code <= _FLOAT32_EXACT_BELOW else torch.float64

"""`torch.ops.mergequant.integer_linear_triton`: the operator that launches the Triton program."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mergequant_vllm.kernels.codes import as_rows
from mergequant_vllm.kernels.linear.spans import span_slices
from mergequant_vllm.kernels.linear.triton.tiles import LinearShape, Tile, tile_for
from mergequant_vllm.kernels.linear.triton.unpacking import unpacking
from mergequant_vllm.kernels.torch_operator import define_operator
from mergequant_vllm.kernels.triton_mode import interpreted


def compile_options(tile: Tile) -> dict[str, int]:
    """Return Triton's own options.

    No fusion: `y * step + constant` contracted to one multiply-add would round once where the
    reference rounds twice.
    """
    return {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": False,
    }


def integer_linear(
    codes: Tensor,
    weight: Tensor,
    weight_step: Tensor,
    zero_points: Tensor | None,
    weight_sums: Tensor | None,
    ends: Tensor | None,
    token_step: Tensor | None,
    token_zero: Tensor | None,
    constant: Tensor | None,
    in_features: int,
    weight_bits: int,
    group_size: int | None,
    segments: Sequence[int] | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The operator: opaque to torch.compile.

    Args:
        codes: int8 [..., columns]; rows may be further apart.
        weight: int8 [N, bytes], contiguous.
        weight_step: float32 [spans, N].
        zero_points: int8 [spans, N] or None.
        weight_sums: int32 [spans, N]; needed with token_zero.
        ends: int32 [groups], see `LinearShape.segment_ends`; needed with segments.
        token_step: float32 [..., 1] or None.
        token_zero: int32 [..., 1] or None.
        constant: float32 [N] or None.
        in_features: K.
        weight_bits: width of the stored codes.
        group_size: inputs that share a step; None: no groups.
        segments: lengths of the segments; None: no segments.
        out_dtype: dtype of the result.

    Returns:
        `out_dtype` [..., N].
    """
    lengths = None if segments is None else tuple(segments)
    shape = LinearShape(weight.shape[0], in_features, weight_bits, group_size, lengths)
    if codes.shape[-1] != shape.layout.columns:
        raise ValueError(
            f"The Triton linear takes rows of {shape.layout.columns} codes, not {codes.shape[-1]}."
        )
    x = as_rows(codes)
    tokens = x.shape[0]
    # Triton's interpreter truncates to bfloat16; PyTorch rounds, as GPUs do.
    out = x.new_empty(
        (tokens, weight.shape[0]), dtype=torch.float32 if interpreted() else out_dtype
    )
    if tokens > 0:
        tensors = Tensors(
            weight,
            weight_step,
            zero_points,
            weight_sums,
            ends,
            None if token_step is None else token_step.reshape(-1).contiguous(),
            None if token_zero is None else token_zero.reshape(-1).contiguous(),
            constant,
        )
        launch(tile_for(shape, tokens, x.device), shape, x, tensors, out)
    return out.to(out_dtype).reshape(*codes.shape[:-1], weight.shape[0])


class Tensors(NamedTuple):
    """What the program reads besides the codes: see `integer_linear_program`."""

    weight: Tensor
    weight_step: Tensor
    zero_points: Tensor | None
    weight_sums: Tensor | None
    ends: Tensor | None
    token_step: Tensor | None
    token_zero: Tensor | None
    constant: Tensor | None


def launch(tile: Tile, shape: LinearShape, codes: Tensor, given: Tensors, out: Tensor) -> None:
    """Run the program with one tile: see `integer_linear_program`."""
    from mergequant_vllm.kernels.linear.triton.program import integer_linear_program

    layout = shape.layout
    tokens, outputs = out.shape
    zero_points = given.zero_points
    integer_linear_program[(-(-tokens // tile.block_m) * -(-outputs // tile.block_n),)](
        codes,
        given.weight,
        given.weight_step,
        zero_points,
        None if zero_points is None else sum_spans(codes, shape),
        given.weight_sums,
        given.ends,
        given.token_step,
        given.token_zero,
        given.constant,
        out,
        tokens,
        outputs,
        layout.columns,
        codes.stride(0),
        layout.row_bytes,
        BITS=layout.bits,
        RUN=layout.run,
        PARTS=layout.parts,
        GROUP=shape.group or 0,
        UNPACK=() if interpreted() else unpacking(layout.bits),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        **compile_options(tile),
    )


def sum_spans(codes: Tensor, shape: LinearShape) -> Tensor:
    """Return the sums of the activation codes of each span: int8 [M, columns] to int32 [spans, M].

    Here, once a token, and not in the kernel, where each tile of outputs would sum them again.
    """
    if shape.segments is not None:
        spans = span_slices(shape.in_features, None, shape.segments) or []
        return torch.stack([codes[:, span].sum(-1, dtype=torch.int32) for span in spans])
    if shape.group_size is None:
        return codes[:, : shape.in_features].sum(-1, dtype=torch.int32)
    short = shape.groups * shape.group_size - shape.layout.columns
    x = F.pad(codes, (0, short)) if short else codes
    sums = x.reshape(-1, shape.groups, shape.group_size).sum(-1, dtype=torch.int32)
    return sums.T.contiguous()


def _fake(codes: Tensor, weight: Tensor, *others: Any) -> Tensor:
    out_dtype: torch.dtype = others[-1]
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=out_dtype)


integer_linear_triton = define_operator("integer_linear_triton", integer_linear, _fake)

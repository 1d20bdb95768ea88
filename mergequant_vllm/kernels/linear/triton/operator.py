"""`torch.ops.mergequant.integer_linear_triton`: the operator that launches the Triton program."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mergequant_vllm.kernels.codes import as_rows
from mergequant_vllm.kernels.linear.triton.program import build_kernel, interpreted, unpacking
from mergequant_vllm.kernels.linear.triton.tile_tables import tile_for
from mergequant_vllm.kernels.linear.triton.tiles import LinearShape, Tile
from mergequant_vllm.kernels.torch_operator import define_operator


def compile_options(tile: Tile) -> dict[str, int]:
    """Triton's own options.

    No fusion: `y * step + bias` contracted to one multiply-add would round once where the reference
    rounds twice.
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
    spans: Tensor | None,
    token_step: Tensor | None,
    token_zero: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    weight_bits: int,
    group_size: int | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The operator: opaque to torch.compile.

    Args:
        codes: int8 [..., columns]; rows may be further apart.
        weight: int8 [N, bytes], contiguous.
        weight_step: float32 [groups, N].
        zero_points: int8 [groups, N] or None.
        token_step: float32 [..., 1] or None.
        bias: float32 [N], the constant, or None.
        in_features: K.
        weight_bits: width of the stored codes.
        group_size: inputs that share a step; None: all.
        out_dtype: dtype of the result.

    Returns:
        `out_dtype` [..., N].
    """
    shape = LinearShape(weight.shape[0], in_features, weight_bits, group_size)
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
        step = None if token_step is None else token_step.reshape(-1).contiguous()
        tile = tile_for(shape, tokens, x.device)
        launch(tile, shape, x, weight, weight_step, zero_points, step, bias, out)
    return out.to(out_dtype).reshape(*codes.shape[:-1], weight.shape[0])


def launch(
    tile: Tile,
    shape: LinearShape,
    codes: Tensor,
    weight: Tensor,
    weight_step: Tensor,
    zero_points: Tensor | None,
    token_step: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Run the program with one tile, which benchmarks choose: see `integer_linear_program`."""
    layout = shape.layout
    tokens, outputs = out.shape
    build_kernel()[(-(-tokens // tile.block_m) * -(-outputs // tile.block_n),)](
        codes,
        weight,
        weight_step,
        zero_points,
        None if zero_points is None else sum_groups(codes, shape),
        token_step,
        bias,
        out,
        tokens,
        outputs,
        layout.columns,
        codes.stride(0),
        layout.row_bytes,
        BITS=layout.bits,
        RUN=layout.run,
        PARTS=layout.parts,
        GROUP=shape.group_size or 0,
        UNPACK=() if interpreted() else unpacking(layout.bits),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        **compile_options(tile),
    )


def sum_groups(codes: Tensor, shape: LinearShape) -> Tensor:
    """Sums of the activation codes of each group: int8 [M, columns] to int32 [groups, M].

    Here, once a token, and not in the kernel, where each tile of outputs would sum them again.
    """
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

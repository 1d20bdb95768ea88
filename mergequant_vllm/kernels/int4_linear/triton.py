"""INT4 linear on GPUs: one Triton kernel over int8 tensor cores, weights packed until registers.

Stored layout, kept: int32 [N, words], word j of a row holds columns 8j..8j+7 as code + 8, column 8j
in the lowest nibble. Nibbles beyond K are 0, that is code -8; the activations there are read as 0.

Kernel layout inside a tile: words [BLOCK_N, BLOCK_K / 8] become int8 codes [BLOCK_N, BLOCK_K] in
registers and meet int8 activations [BLOCK_M, BLOCK_K] in an int8 product with int32 sums.

Triton is imported when the kernel is first built: this module also loads where Triton is absent.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mergequant_vllm.kernels.int4_linear.spec import LinearSpec

if TYPE_CHECKING:
    import triton.language as tl

WEIGHT_BITS = 4

# Triton 3.9 does not compile int8 products for older GPUs (7.5 tried).
OLDEST_CAPABILITY = (8, 0)


class Tile(NamedTuple):
    """What one program computes and how it is compiled; BLOCK_K counts codes."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# The largest number of tokens for each tile, in order; the last tile serves every larger M.
TILES: tuple[tuple[int, Tile], ...] = (
    (16, Tile(block_m=16, block_n=32, block_k=256, num_warps=4, num_stages=4)),
    (64, Tile(block_m=64, block_n=64, block_k=128, num_warps=4, num_stages=3)),
)
LARGEST_TILE = Tile(block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=3)


def interpreted() -> bool:
    """Whether the user asks Triton to interpret kernels, which needs no GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose_tile(tokens: int) -> Tile:
    """The tile for M = `tokens`; fixed, since autotuning needs a GPU and would vary by run."""
    return next((tile for most, tile in TILES if tokens <= most), LARGEST_TILE)


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


def int4_linear_program(
    codes: tl.tensor,
    weight: tl.tensor,
    weight_step: tl.tensor,
    token_step: tl.tensor | None,
    bias: tl.tensor | None,
    out: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One [BLOCK_M, BLOCK_N] tile of the output; source of the Triton kernel.

    Args:
        codes: int8 [M, K], contiguous.
        weight: int32 [N, words], contiguous.
        weight_step: float32 [N].
        token_step: float32 [M] or None.
        bias: [N] of any floating dtype, or None.
        out: [M, N], contiguous, written in its own dtype.
        M: tokens.
        N: outputs.
        K: inputs.
        BLOCK_M: tokens of the tile.
        BLOCK_N: outputs of the tile.
        BLOCK_K: inputs, in codes, of one step along K.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    words_per_row = (K + 7) // 8
    # 64 bits: M * K and M * N pass 2^31 in long prefills.
    code_rows = codes + rows.to(tl.int64)[:, None] * K
    weight_rows = weight + columns.to(tl.int64)[:, None] * words_per_row
    shifts = 4 * tl.arange(0, 8)[None, None, :]

    sums = tl.full((BLOCK_M, BLOCK_N), 0, tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(code_rows + k, mask=(rows[:, None] < M) & (k < K), other=0)
        j = start // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
        in_weight = (columns[:, None] < N) & (j < words_per_row)
        words = tl.load(weight_rows + j, mask=in_weight, other=0)
        w = (((words[:, :, None] >> shifts) & 15) - 8).to(tl.int8)
        w = tl.reshape(w, (BLOCK_N, BLOCK_K))
        sums = tl.dot(x, tl.trans(w), sums, out_dtype=tl.int32)

    # The reference's order; `compile_options` keeps it.
    y = sums.to(tl.float32)
    if token_step is not None:
        y = y * tl.load(token_step + rows, mask=rows < M, other=0)[:, None]
    y = y * tl.load(weight_step + columns, mask=columns < N, other=0)[None, :]
    if bias is not None:
        y = y + tl.load(bias + columns, mask=columns < N, other=0).to(tl.float32)[None, :]
    out_rows = out + rows.to(tl.int64)[:, None] * N
    in_out = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(out_rows + columns[None, :], y.to(out.dtype.element_ty), mask=in_out)


@functools.cache
def build_kernel() -> Any:
    """The Triton kernel of `int4_linear_program`; interpreted if TRITON_INTERPRET=1 by now."""
    import triton
    import triton.language

    # Triton resolves `tl` among the globals of the program's module, its interpreter only there.
    globals()["tl"] = triton.language
    return triton.jit(int4_linear_program, do_not_specialize=["M"])


@torch.library.custom_op("mergequant::int4_linear_triton", mutates_args=())
def int4_linear(
    codes: Tensor,
    weight: Tensor,
    weight_step: Tensor,
    token_step: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Launch the kernel; opaque to torch.compile.

    Args:
        codes: int8 [..., K].
        weight: int32 [N, words], contiguous.
        weight_step: float32 [N].
        token_step: float32 [..., 1] or None.
        bias: [N] of any floating dtype, or None.
        out_dtype: dtype of the result.

    Returns:
        `out_dtype` [..., N].
    """
    K, N = codes.shape[-1], weight.shape[0]
    codes_2d = codes.reshape(-1, K).contiguous()
    M = codes_2d.shape[0]
    # Triton's interpreter truncates to bfloat16; PyTorch rounds, as GPUs do.
    out = codes.new_empty((M, N), dtype=torch.float32 if interpreted() else out_dtype)
    tile = choose_tile(M)
    build_kernel()[(-(-M // tile.block_m), -(-N // tile.block_n))](
        codes_2d,
        weight,
        weight_step,
        None if token_step is None else token_step.reshape(-1).contiguous(),
        bias,
        out,
        M,
        N,
        K,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        **compile_options(tile),
    )
    return out.to(out_dtype).reshape(*codes.shape[:-1], N)


@int4_linear.register_fake
def _(
    codes: Tensor,
    weight: Tensor,
    weight_step: Tensor,
    token_step: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=out_dtype)


class TritonLinear:
    """Weights stay at 4 bits in memory; exact through int32 sums."""

    name = "triton"
    code_dtype = torch.int8

    def refusal(self, spec: LinearSpec) -> str | None:
        """Refuses other widths, a missing Triton and, unless interpreted, CPUs and old GPUs."""
        if spec.weight_bits != WEIGHT_BITS:
            return f"it reads {WEIGHT_BITS}-bit weights and the layer has {spec.weight_bits} bits"
        try:
            import triton
            import triton.language  # noqa: F401
        except ImportError as error:
            return f"Triton cannot be imported ({error})"
        return None if interpreted() else _device_refusal(spec.device)

    def prepare(self, weight_packed: Tensor, spec: LinearSpec) -> Tensor:
        """int32 [N, words] as stored, contiguous."""
        return weight_packed.contiguous()

    def linear(
        self,
        codes: Tensor,
        weight: Tensor,
        weight_step: Tensor,
        token_step: Tensor | None,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """As `reference`, bit for bit."""
        y: Tensor = int4_linear(codes, weight, weight_step, token_step, bias, out_dtype)
        return y


def _device_refusal(device: str) -> str | None:
    if device != "cuda":
        return f"it runs on GPUs (or with TRITON_INTERPRET=1) and the layer is on {device}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        needed, found = OLDEST_CAPABILITY, torch.cuda.get_device_capability()
        return (
            f"it needs compute capability {needed[0]}.{needed[1]} and the GPU has "
            f"{found[0]}.{found[1]}"
        )
    return None

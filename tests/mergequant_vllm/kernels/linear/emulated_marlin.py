"""vLLM's Marlin functions on the CPU: they check what the kernels demand and read their layout.

The layout is stated twice. Weights are repacked by vLLM's Python model of it, and steps and bias
are permuted by vLLM's functions; they are read here by the fragments of PTX's mma.m16n8k32, with
8-bit operands: of 8 columns, lane 4 * n + q of a warp holds rows 4q .. 4q+3 and 16+4q .. 16+4q+3 of
column n of the operand, and columns 2q and 2q+1 of the result.
"""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mergequant_vllm.kernels.linear.reference import integer_products

MULTIPROCESSORS = 132

# Channels of each warp of each thread block that work on one output.
Shares = list[list[Tensor]]


def alone(columns: int) -> Shares:
    """One warp has all channels."""
    return [[torch.arange(columns)]]


def shared(columns: int) -> Shares:
    """Three thread blocks of two warps, which take turns of 32 channels."""
    borders = [0, columns // 4, columns // 2, columns]
    blocks = [torch.arange(start, stop) for start, stop in pairwise(borders)]
    return [[block[block // 32 % 2 == warp] for warp in (0, 1)] for block in blocks]


def nibbles(words: Tensor) -> Tensor:
    """int32 [...] to uint4 values int32 [..., 8], lowest first."""
    return (words.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15


def read_weight(weight: Tensor, size_k: int, size_n: int) -> Tensor:
    """int32 [K/16, 2N] to codes int8 [N, K].

    Tiles of 32 rows by 32 columns, along N first; a tile is 32 lanes of one word for each of its
    four blocks of 8 columns; a word alternates rows below and from 16.
    """
    tiles = nibbles(weight.reshape(size_k // 32, size_n // 32, 8, 4, 4))
    # [k tile, n tile, n, q, block, row of four, half]
    tiles = tiles.reshape(*tiles.shape[:-1], 4, 2)
    codes = tiles.permute(1, 4, 2, 0, 6, 3, 5).reshape(size_n, size_k) - 8
    return codes.to(torch.int8)


def read_columns(values: Tensor) -> Tensor:
    """Steps or bias [N] in the order of columns: q has columns 2q, 2q+1 of each of four blocks."""
    return values.reshape(-1, 4, 4, 2).transpose(1, 2).reshape(-1)


def repack(given: dict[str, Any]) -> Tensor:
    """`gptq_marlin_repack`: its demands, and vLLM's Python model of the result."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils_test as model

    words, k, n = given["b_q_weight"], given["size_k"], given["size_n"]
    assert given["num_bits"] == 4 and given["is_a_8bit"] is True
    assert k % 32 == 0 and n % 64 == 0
    assert words.dtype == torch.int32 and words.shape == (k // 8, n) and words.is_contiguous()
    values = nibbles(words).transpose(1, 2).reshape(k, n)
    order = model.get_weight_perm(4, is_a_8bit=True)
    packed: Tensor = model.marlin_weights(values, k, n, 4, order, is_a_8bit=True)
    return packed


def check_operands(given: dict[str, Any]) -> None:
    """What the kernel demands, and what it reads without checking."""
    from vllm.scalar_type import scalar_types

    a, weight, step, bias = (given[x] for x in ("a", "b_q_weight", "b_scales", "b_bias"))
    m, n, k = given["size_m"], given["size_n"], given["size_k"]
    assert (n % 64 == 0 and k % 128 == 0) or (n % 128 == 0 and k % 64 == 0)
    assert a.dtype == torch.int8 and a.shape == (m, k)
    assert a.stride(1) == 1 and a.stride(0) % 16 == 0 and a.storage_offset() % 16 == 0
    assert a.data_ptr() % 16 == 0
    assert weight.dtype == torch.int32 and weight.shape == (k // 16, 2 * n)
    assert weight.is_contiguous()
    assert step.dtype in (torch.float16, torch.bfloat16)
    assert step.shape == (1, n) and step.is_contiguous()
    assert bias is None or (bias.dtype == step.dtype and bias.shape == (n,))
    assert bias is None or bias.is_contiguous()
    scales = given["a_scales"]
    assert scales.dtype == torch.float32 and scales.is_contiguous()
    assert scales.dim() == 1 and scales.numel() >= m
    locks = given["workspace"]
    assert locks.dtype == torch.int32 and locks.numel() >= MULTIPROCESSORS and not locks.any()
    assert given["b_q_type"] == scalar_types.uint4b8
    assert given["use_fp32_reduce"] and not given["use_atomic_add"]
    assert all(given[x] is None for x in ("c", "global_scale", "b_zeros"))


def multiply(given: dict[str, Any], shares: Callable[[int], Shares]) -> Tensor:
    """`marlin_gemm`: [M, N] by the documented order of roundings."""
    check_operands(given)
    weight = read_weight(given["b_q_weight"], given["size_k"], given["size_n"])
    step = read_columns(given["b_scales"][0]).float()
    token_step = given["a_scales"][: given["size_m"], None]
    y: Tensor | None = None
    for block in shares(given["size_k"]):
        sums = [integer_products(given["a"][:, warp], weight[:, warp]) for warp in block]
        part = sum((x.float() * token_step for x in sums[1:]), sums[0].float() * token_step) * step
        y = part if y is None else y + part
    assert y is not None
    y = y.to(given["b_scales"].dtype)
    return y if given["b_bias"] is None else y + read_columns(given["b_bias"])


def taking(arguments: str, body: Callable[[dict[str, Any]], Tensor]) -> Callable[..., Tensor]:
    """A function that takes exactly `arguments`, and hands them to `body` by name."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    defaults: dict[str, Any] = {"False": False, "True": True, "": inspect.Parameter.empty}
    pairs = [word.partition("=")[::2] for word in arguments.split()]
    signature = inspect.Signature(
        [inspect.Parameter(name, kind, default=defaults[value]) for name, value in pairs]
    )

    def function(*positional: Any, **named: Any) -> Tensor:
        bound = signature.bind(*positional, **named)
        bound.apply_defaults()
        return body(check_order(bound.arguments))

    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def check_order(given: dict[str, Any]) -> dict[str, Any]:
    """0.26's order of the input channels is the natural one."""
    for name in {"g_idx", "perm"} & given.keys():
        assert given[name].dtype == torch.int32 and given[name].numel() == 0
    assert given.get("is_k_full", True) is True
    return given


# Arguments of `marlin_gemm` and `gptq_marlin_repack` in vLLM 0.26.0, and in 0.32.0 and 0.33.0.
TENSORS = "a c b_q_weight b_bias b_scales a_scales global_scale b_zeros"
SIZES = "workspace b_q_type size_m size_n size_k"
FLAGS = "use_atomic_add=False use_fp32_reduce=False is_zp_float=False"
ARGUMENTS = {
    "0.26": (
        f"{TENSORS} g_idx perm {SIZES} is_k_full=True {FLAGS}",
        "b_q_weight perm size_k size_n num_bits is_a_8bit=False",
    ),
    "0.32": (f"{TENSORS} {SIZES} {FLAGS}", "b_q_weight size_k size_n num_bits is_a_8bit=False"),
}


def functions(
    version: str, shares: Callable[[int], Shares] = alone
) -> dict[str, Callable[..., Tensor]]:
    """vLLM's two functions with the arguments that `version` gives them."""
    gemm, repacking = ARGUMENTS[version]
    return {
        "marlin_gemm": taking(gemm, lambda given: multiply(given, shares)),
        "gptq_marlin_repack": taking(repacking, repack),
    }


def install(
    patch: pytest.MonkeyPatch, version: str = "0.32", shares: Callable[[int], Shares] = alone
) -> None:
    """Put the functions in the place of vLLM's."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    def locks(device: torch.device, max_blocks_per_sm: int = 1) -> Tensor:
        return torch.zeros(MULTIPROCESSORS * max_blocks_per_sm, dtype=torch.int32, device=device)

    for name, function in functions(version, shares).items():
        patch.setattr(_custom_ops, name, function)
    patch.setattr(marlin_utils, "marlin_make_workspace_new", locks)

"""What our linear is compared with on a CPU: the same product of codes as others run it.

All get the same codes, which float32 and bfloat16 hold exactly, so that every result can be held
against the definition. The two kernels of PyTorch for integers are those that torchao calls on
CPUs: its wheels (0.18) hold none of their own. vLLM is imported inside the function that needs it;
a baseline that does not run here raises Refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.result_cells import Refused

GROUP = 128  # input channels that share a step, of kernels that want groups
Multiply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Baseline:
    """One way to run a linear.

    Attributes:
        weight_bits: in memory.
        make: weight codes int8 [N, K] to a function from activations to [M, N]; each call of
            `make` has weights of its own.
        inputs: activation codes int8 [M, K] to what that function takes.
        close: how far, relative to the largest result, it may be from the exact product.
        what: what it does beside the product, or not.
    """

    weight_bits: int
    make: Callable[[Tensor], Multiply]
    inputs: Callable[[Tensor], Tensor]
    close: float
    what: str


def _float32(codes: Tensor) -> Multiply:
    weight = codes.to(torch.float32)
    return lambda x: F.linear(x, weight)


def _bfloat16(codes: Tensor) -> Multiply:
    weight = codes.to(torch.bfloat16)
    return lambda x: F.linear(x, weight)


def _int_mm(codes: Tensor) -> Multiply:
    weight = codes.clone().t()
    return lambda x: torch._int_mm(x, weight)


def _onednn(codes: Tensor) -> Multiply:
    """vLLM's W8A8 with one step for all tokens: the product, scaled, in float32."""
    operations = _vllm()
    n = codes.shape[0]
    scale, one = torch.ones(n, 1), torch.ones(1)
    handler = operations.create_onednn_scaled_mm(
        codes.clone().t(), scale, torch.float32, False, False, 32
    )

    # The handler points to the scale, which must live as long.
    def multiply(x: Tensor, scale: Tensor = scale) -> Tensor:
        out = torch.empty(x.shape[0], n)
        operations.onednn_scaled_mm(handler, x, out, one, None, None, None)
        return out

    return multiply


def _vllm() -> Any:
    try:
        from vllm import _custom_ops
        from vllm.platforms import current_platform

        current_platform.import_kernels()
    except ImportError as error:
        raise Refused(f"vLLM cannot be imported ({error})") from error
    if not getattr(_custom_ops, "_supports_onednn", False) and not hasattr(
        torch.ops._C, "create_onednn_scaled_mm_handler"
    ):
        raise Refused("this vLLM was built without oneDNN")
    return _custom_ops


def _int4_weights(codes: Tensor) -> Multiply:
    """PyTorch's W4A16 for CPUs: steps for groups of 128 input channels, bfloat16 between."""
    n, k = codes.shape
    if k % GROUP:
        raise Refused(f"it needs K a multiple of {GROUP}, not {k}")
    if n % 16:
        raise Refused(f"it needs N a multiple of 16, not {n}")
    operations = torch.ops.aten
    packed = operations._convert_weight_to_int4pack_for_cpu((codes.to(torch.int32) + 8), 1)
    # A code c stands for (c - 8) * step + zero.
    steps = torch.stack((torch.ones(k // GROUP, n), torch.zeros(k // GROUP, n)), dim=-1)
    steps = steps.to(torch.bfloat16).contiguous()
    return lambda x: operations._weight_int4pack_mm_for_cpu(x, packed, GROUP, steps)


def _auto_round(codes: Tensor) -> Multiply:
    """AutoRound's 4-bit weights in groups; it rounds float32 activations to 8 bits itself."""
    n, k = codes.shape
    if k % GROUP:
        raise Refused(f"it needs K a multiple of {GROUP}, not {k}")
    try:
        import auto_round_kernel as kernel  # type: ignore[import-not-found]
    except ImportError as error:
        raise Refused("install it: python -m benchmarks.cpu peers, and name --peers") from error
    form = (GROUP, "int8", "int4", "fp32", False)
    zero = torch.zeros(k // GROUP, n, dtype=torch.int8)
    steps = torch.ones(k // GROUP, n)
    packed = kernel.repack_quantized_weight(codes.t().contiguous(), steps, zero, *form)
    bias = torch.empty(0)
    return lambda x: kernel.woqgemm(x, packed, bias, n, k, *form)


def _same(x: Tensor) -> Tensor:
    return x


def _to_float32(x: Tensor) -> Tensor:
    return x.to(torch.float32)


def _to_bfloat16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)


FLOAT32, BFLOAT16, INT8 = "torch float32", "torch bfloat16", "torch int8"
ONEDNN, INT4 = "vllm oneDNN int8", "torch int4 weights"
AUTO_ROUND = "AutoRound int4 weights"
ROUNDED = 2.0**-8  # a result rounded to bfloat16
EIGHT_BITS = 2.0**-7  # activations rounded to 8 bits once more
BASELINES = {
    FLOAT32: Baseline(32, _float32, _to_float32, 0.0, "F.linear"),
    BFLOAT16: Baseline(16, _bfloat16, _to_bfloat16, ROUNDED, "F.linear"),
    INT8: Baseline(8, _int_mm, _same, 0.0, "torch._int_mm: int32 results, nothing scaled"),
    ONEDNN: Baseline(8, _onednn, _same, 0.0, "onednn_scaled_mm: one step for all tokens, float32"),
    INT4: Baseline(
        4, _int4_weights, _to_bfloat16, ROUNDED, "_weight_int4pack_mm_for_cpu: groups, bfloat16"
    ),
    AUTO_ROUND: Baseline(
        4, _auto_round, _to_float32, EIGHT_BITS, "woqgemm: groups, activations to int8 within"
    ),
}

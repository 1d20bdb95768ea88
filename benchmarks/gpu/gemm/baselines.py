"""What our kernels are compared with: the same linear as others run it, random weights.

vLLM is imported inside the functions; a baseline that does not run here raises Refused.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.result_cells import Refused
from benchmarks.gpu.timing import Call

GROUP = 128


@dataclass(frozen=True)
class Baseline:
    """One way to run a linear.

    Attributes:
        weight_bits: in memory.
        activation_bits: of what it reads for each input channel of a token.
        arithmetic: whose peak rate bounds it: `bf16`, `int8` or `fp8`.
        make: (N, K, generator) to a function from activations [M, K] of `inputs` to [M, N].
        inputs: (M, K, generator) to the activations.
    """

    weight_bits: int
    activation_bits: int
    arithmetic: str
    make: Callable[[int, int, torch.Generator], Callable[[Tensor], Tensor]]
    inputs: Callable[[int, int, torch.Generator], Tensor]


def calls(multiply: Sequence[Callable[[Tensor], Tensor]], activations: Tensor) -> list[Call]:
    """One call for each copy of the weights."""
    return [functools.partial(one, activations) for one in multiply]


def _normal(m: int, k: int, generator: torch.Generator) -> Tensor:
    device = generator.device
    return torch.randn(m, k, generator=generator, device=device, dtype=torch.bfloat16)


def _int8(m: int, k: int, generator: torch.Generator) -> Tensor:
    device = generator.device
    return torch.randint(-128, 128, (m, k), generator=generator, device=device, dtype=torch.int8)


def _fp8(m: int, k: int, generator: torch.Generator) -> Tensor:
    return _normal(m, k, generator).to(torch.float8_e4m3fn)


def _torch_bf16(n: int, k: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    weight = _normal(n, k, generator)
    return lambda x: F.linear(x, weight)


def _needs_gpu(generator: torch.Generator) -> None:
    if generator.device.type != "cuda":
        raise Refused(f"it needs an NVIDIA GPU and this is {generator.device.type}")
    try:
        import vllm._custom_ops  # noqa: F401
    except ImportError as error:
        raise Refused(f"vLLM cannot be imported ({error})") from error


def _marlin_w4a16(n: int, k: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Random words in the kernel's own layout, a permutation of the stored one."""
    _needs_gpu(generator)
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    if n % 64 or k % GROUP:
        raise Refused(f"it needs N a multiple of 64 and K of {GROUP}, not {n} and {k}")
    device = generator.device
    weight = torch.randint(
        -(2**31), 2**31, (k // 16, 2 * n), generator=generator, device=device, dtype=torch.int32
    )
    scale = torch.rand(k // GROUP, n, generator=generator, device=device).to(torch.bfloat16)
    empty = torch.empty(0, dtype=torch.int32, device=device)
    arguments = {
        "weight": weight,
        "weight_scale": scale,
        "weight_zp": empty,
        "g_idx": empty,
        "g_idx_sort_indices": empty,
        "workspace": marlin_utils.marlin_make_workspace_new(device),
        "wtype": scalar_types.uint4b8,
        "output_size_per_partition": n,
        "input_size_per_partition": k,
        "is_k_full": True,
    }
    # Versions differ in whether they ask for an order of the input channels.
    function = marlin_utils.apply_gptq_marlin_linear
    known = inspect.signature(function).parameters
    arguments = {name: value for name, value in arguments.items() if name in known}
    return lambda x: function(x, **arguments)


def _scaled_mm(
    module: str, name: str, weight_of: Callable[[int, int, torch.Generator], Tensor]
) -> Callable[[int, int, torch.Generator], Callable[[Tensor], Tensor]]:
    """A W8A8 product of vLLM's: a step per token, a step per output channel."""

    def make(n: int, k: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        _needs_gpu(generator)
        function = getattr(__import__(module, fromlist=[name]), name)
        device = generator.device
        weight = weight_of(n, k, generator).t()
        step = torch.full((n, 1), 2.0**-9, device=device)
        ones: dict[int, Tensor] = {}

        def multiply(x: Tensor) -> Tensor:
            m = x.shape[0]
            if m not in ones:  # made at the first call, which is not timed
                ones[m] = torch.ones(m, 1, device=device)
            y: Tensor = function(x, weight, ones[m], step, torch.bfloat16)
            return y

        return multiply

    return make


_TRITON = "vllm.model_executor.layers.quantization.compressed_tensors.triton_scaled_mm"
BF16, MARLIN, INT8 = "torch bf16", "vllm marlin W4A16", "vllm cutlass W8A8 INT8"
BASELINES = {
    BF16: Baseline(16, 16, "bf16", _torch_bf16, _normal),
    MARLIN: Baseline(4, 16, "bf16", _marlin_w4a16, _normal),
    INT8: Baseline(8, 8, "int8", _scaled_mm("vllm._custom_ops", "cutlass_scaled_mm", _int8), _int8),
    "vllm triton W8A8 INT8": Baseline(
        8, 8, "int8", _scaled_mm(_TRITON, "triton_scaled_mm", _int8), _int8
    ),
    "vllm cutlass W8A8 FP8": Baseline(
        8, 8, "fp8", _scaled_mm("vllm._custom_ops", "cutlass_scaled_mm", _fp8), _fp8
    ),
}

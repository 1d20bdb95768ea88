"""What vLLM's CUTLASS and Marlin kernels refuse, and why; beside a vLLM of operations alone."""

import itertools
import sys
import types

import pytest
import torch

from mergequant_vllm.kernels.linear.cutlass import CutlassLinear
from mergequant_vllm.kernels.linear.marlin import MarlinLinear
from tests.mergequant_vllm.kernels.made import GPU, make_spec

Kernel = CutlassLinear | MarlinLinear
CUTLASS, MARLIN = CutlassLinear(), MarlinLinear()
KERNELS: list[Kernel] = [CUTLASS, MARLIN]
# What a kernel calls in vLLM, in the order in which it is missed.
OPERATIONS = {
    CUTLASS.name: ("cutlass_scaled_mm",),
    MARLIN.name: ("gptq_marlin_repack", "marlin_gemm"),
}

OF_BOTH: list[tuple[dict[str, object], str]] = [
    ({"device": "cpu"}, "it runs on NVIDIA GPUs and the layer is on cpu"),
    ({"group_size": 128}, "it takes a step per output channel, the layer has groups of 128"),
    ({"zero_points": True}, "it takes no zero points and the layer has them"),
    (
        {"token_zero_points": True, "dynamic": True},
        "it takes no zero points of activations and the layer's tokens have them",
    ),
    (
        {"dtype": torch.float32},
        "it writes bfloat16 or float16 and the model is in float32; use --dtype bfloat16",
    ),
]
BLACKWELL = (
    "INT8 is not in vLLM's CUTLASS kernels for Blackwell (compute capability {}); "
    "choose marlin-int8"
)
REFUSALS: list[tuple[Kernel, dict[str, object], str]] = [
    *((kernel, *case) for kernel in KERNELS for case in OF_BOTH),
    (CUTLASS, {"capability": 70}, "it needs compute capability 7.5 and the GPU has 7.0"),
    (CUTLASS, {"capability": 100}, BLACKWELL.format("10.0")),
    (CUTLASS, {"capability": 120}, BLACKWELL.format("12.0")),
    (MARLIN, {"capability": 75}, "it needs compute capability 8.0 and the GPU has 7.5"),
    (MARLIN, {"weight_bits": 3}, "it reads 4-bit weights and the layer has 3 bits"),
]
SERVED: list[tuple[Kernel, str, int, int | None]] = [
    *itertools.product([CUTLASS], ["weight_bits"], [3, 4, 8], [75, 80, 89, 90, None]),
    *itertools.product([MARLIN], ["activation_bits"], [4, 8], [80, 86, 90, 100, 120, None]),
]


def install(patch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    """A vLLM that has this kernel's operations and nothing else."""
    package, module = types.ModuleType("vllm"), types.ModuleType("vllm._custom_ops")
    package._custom_ops = module  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "vllm", package)
    patch.setitem(sys.modules, "vllm._custom_ops", module)
    operations = dict.fromkeys(OPERATIONS[kernel.name], object())
    patch.setattr(torch.ops, "_C", types.SimpleNamespace(**operations))


def name_of(value: object) -> str | None:
    """A kernel's name; None for what pytest names by itself."""
    return getattr(value, "name", None)


@pytest.mark.parametrize(
    ("kernel", "changes", "reason"),
    REFUSALS,
    ids=[f"{kernel.name}-{next(iter(changes))}" for kernel, changes, _ in REFUSALS],
)
def test_refuses_what_the_kernel_cannot_hold(
    kernel: Kernel, changes: dict[str, object], reason: str
) -> None:
    assert kernel.refusal(make_spec(**{**GPU, **changes})) == reason


@pytest.mark.parametrize(("kernel", "width", "bits", "capability"), SERVED, ids=name_of)
def test_serves_all_widths(
    kernel: Kernel, width: str, bits: int, capability: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, kernel)
    changes = {width: bits, "capability": capability}
    assert kernel.refusal(make_spec(**{**GPU, **changes})) is None


@pytest.mark.parametrize("kernel", KERNELS, ids=name_of)
def test_refuses_a_vllm_without_the_operations(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, kernel)
    for name in reversed(OPERATIONS[kernel.name]):
        delattr(torch.ops._C, name)
        assert kernel.refusal(make_spec(**GPU)) == (
            f"this build of vLLM has no operation {name}; install vLLM for CUDA"
        )


@pytest.mark.parametrize("kernel", KERNELS, ids=name_of)
def test_refuses_without_vllm(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert str(kernel.refusal(make_spec(**GPU))).startswith("vLLM cannot be imported (")

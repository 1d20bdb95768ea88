"""What this machine can do at most, measured: memory bandwidth and matrix products."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.common.device import Device
from benchmarks.common.random_linears import generator_on
from benchmarks.common.result_cells import Refused
from benchmarks.gpu.gemm.baselines import BASELINES
from benchmarks.gpu.timing import ROUND_SECONDS, ROUNDS, Call, compare

COPIED_BYTES = 2**31
LARGEST = 8192


def measure_limits(device: Device, *, smoke: bool) -> dict[str, Any]:
    """Measure them.

    Returns:
        `bandwidth` in bytes/s (a large copy, bytes read plus bytes written) and, for `bf16`,
        `int8` and `fp8`, operations/s of the best large product; `from`: all that was tried.
    """
    size = 64 if smoke else LARGEST
    copied = 2**20 if smoke else COPIED_BYTES
    products = {
        f"{name} {size}^3": _product(name, size, device)
        for name in ("torch bf16", "vllm cutlass W8A8 INT8", "vllm cutlass W8A8 FP8")
    }
    subjects = {"copy": _copy(copied, device), **products}
    subjects[f"torch._int_mm {size}^3"] = _int_mm(size, device)
    results = compare(
        subjects,
        device,
        rounds=1 if smoke else ROUNDS,
        round_seconds=0 if smoke else ROUND_SECONDS,
    )
    rates = {
        name: (2 * copied if name == "copy" else 2 * size**3) / (cell["us"] * 1e-6)
        for name, cell in results.items()
        if "us" in cell
    }
    limits: dict[str, Any] = {"bandwidth": rates.pop("copy"), "from": results}
    for kind, word in (("bf16", "bf16"), ("int8", "int"), ("fp8", "fp8")):
        fitting = [rate for name, rate in rates.items() if word in name.lower()]
        limits[kind] = max(fitting, default=None)
    return limits


def _copy(size: int, device: Device) -> Callable[[], Sequence[Call]]:
    def make() -> Sequence[Call]:
        source = torch.randint(255, (size,), dtype=torch.uint8, device=device.kind)
        target = torch.empty_like(source)
        return [lambda: target.copy_(source)]

    return make


def _product(name: str, size: int, device: Device) -> Callable[[], Sequence[Call]]:
    def make() -> Sequence[Call]:
        generator = generator_on(device, 0)
        baseline = BASELINES[name]
        multiply, x = baseline.make(size, size, generator), baseline.inputs(size, size, generator)
        return [lambda: multiply(x)]

    return make


def _int_mm(size: int, device: Device) -> Callable[[], Sequence[Call]]:
    def make() -> Sequence[Call]:
        if not device.is_gpu:
            raise Refused("it is of interest on GPUs only")
        baseline = BASELINES["vllm cutlass W8A8 INT8"]
        generator = generator_on(device, 0)
        a, b = baseline.inputs(size, size, generator), baseline.inputs(size, size, generator).t()
        return [lambda: torch._int_mm(a, b)]

    return make

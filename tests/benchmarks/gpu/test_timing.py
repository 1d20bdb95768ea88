"""What only runs on a GPU, on stand-ins: graphs and events, calls of vLLM's kernels."""

import contextlib
import sys
import types
from typing import Any, ClassVar

import pytest
import torch

from benchmarks.common.device import Device
from benchmarks.common.result_cells import Refused
from benchmarks.gpu import timing
from benchmarks.gpu.gemm import baselines


class FakeEvent:
    """An event of a GPU whose clock is this list's length, in ms."""

    clock: ClassVar[list[None]] = []

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0

    def record(self) -> None:
        self.at = len(self.clock)

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "FakeEvent") -> float:
        return float(end.at - self.at)


class FakeGraph:
    """Replays nothing but the time of one call."""

    def replay(self) -> None:
        FakeEvent.clock.append(None)


def test_a_gpu_is_timed_by_replays_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    gpu = Device("cuda", "a GPU", 90, 2**20, "1")

    def call() -> None:
        FakeEvent.clock.append(None)

    def fail() -> None:
        raise RuntimeError("cannot be captured")

    results = timing.compare(
        {"graph": lambda: [call, call], "launches": lambda: [call], "fails": lambda: [fail]},
        gpu,
        launches=frozenset({"launches"}),
    )
    # Two calls take 2 ms, so that a round of 4 ms is two loops in the graph: four calls in 1 ms.
    assert results["graph"]["timer"] == "graph" and results["graph"]["us"] == 250
    assert results["launches"]["timer"] == "events" and results["launches"]["us"] == 1000
    assert results["fails"] == {"failed": "RuntimeError: cannot be captured"}

    def no_graph(graph: object) -> None:
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(torch.cuda, "graph", no_graph)
    results = timing.compare({"x": lambda: [call]}, gpu)
    assert results["x"]["timer"] == "events (RuntimeError: no graphs here)"


@pytest.mark.parametrize("order", [True, False])
def test_baselines_call_vllm_as_each_version_has_it(
    monkeypatch: pytest.MonkeyPatch, order: bool
) -> None:
    arguments: dict[str, Any] = {}

    def old(
        x: torch.Tensor, weight: torch.Tensor, g_idx: object, is_k_full: bool, **k: Any
    ) -> None:
        arguments.update(k, weight=weight, g_idx=g_idx)

    def new(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> None:
        arguments.update(weight=weight, weight_scale=weight_scale)

    utils = types.SimpleNamespace(
        apply_gptq_marlin_linear=old if order else new,
        marlin_make_workspace_new=lambda device: torch.zeros(4),
    )
    product = lambda a, b, scale_a, scale_b, dtype: (  # noqa: E731
        (a.double() * scale_a) @ (b.double() * scale_b.t())
    ).to(dtype)
    modules = {
        "vllm.model_executor.layers.quantization.utils": types.SimpleNamespace(marlin_utils=utils),
        "vllm.scalar_type": types.SimpleNamespace(scalar_types=types.SimpleNamespace(uint4b8=1)),
        "vllm._custom_ops": types.SimpleNamespace(cutlass_scaled_mm=product),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(baselines, "_needs_gpu", lambda generator: None)
    generator = torch.Generator().manual_seed(0)
    for name in (baselines.MARLIN, baselines.INT8, "vllm cutlass W8A8 FP8"):
        baseline = baselines.BASELINES[name]
        y = baseline.make(64, 256, generator)(baseline.inputs(3, 256, generator))
        assert y is None or (y.shape == (3, 64) and y.dtype is torch.bfloat16)
    assert arguments["weight"].shape == (16, 128) and ("g_idx" in arguments) is order
    with pytest.raises(Refused, match="multiple of 64"):
        baselines.BASELINES[baselines.MARLIN].make(63, 256, generator)

"""Triton code TorchInductor would emit for a GPU, generated on a machine without one.

Nothing is compiled or run: inputs are fake CUDA tensors, the device queries Inductor makes are
answered as an H200 would, and compilation stops once the wrapper's text exists. The Triton
package must be importable (a stock wheel is enough; its driver is never initialised).
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

import torch
from torch._dynamo.device_interface import CudaInterface, device_interfaces, init_device_reg
from torch._inductor import compile_fx, config, decomposition
from torch._inductor.codegen.common import init_backend_registration
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.proxy_tensor import make_fx

Spec = tuple[torch.dtype, Sequence[int | None]]
"""An argument: its dtype and its shape, None where the (single) dynamic token count stands."""

HOPPER = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, gcnArchName="", warp_size=32)
HOPPER.multi_processor_count, HOPPER.regs_per_multiprocessor = 132, 65536
HOPPER.max_threads_per_multi_processor, HOPPER.max_threads_per_block = 2048, 1024
_OPTIONS = {"fx_graph_cache": False, "fx_graph_remote_cache": False, "graph_partition": False}
_KERNEL = re.compile(r"^(\w+) = async_compile\.triton\('\w+', '''\n(.*?)'''", re.M | re.S)
_EXTERN = r"(?:[\w, ]+ = )?((?:torch\.ops|extern_kernels)\.\S.*)"
_CALL = re.compile(rf"^\s+(?:(\w+)\.run\(|{_EXTERN})", re.M)


class _Generated(BaseException):
    """Carries the wrapper's source out of Inductor before it is imported."""


def _stop(_graph: GraphLowering, wrapper: Any) -> NoReturn:
    raise _Generated(wrapper.value)


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """Lends CUDA the no-op device guard of meta tensors.

    A CPU-only build has no guard for CUDA, yet Python tensor methods such as indexing, `~` and
    `contiguous` ask for one even on fake tensors. PyTorch has no call that sets one.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10::DeviceType
    before = guards[cuda]
    guards[cuda] = before or guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


@contextlib.contextmanager
def pretend_hopper() -> Iterator[None]:
    """Answers the device queries Inductor makes as one H100/H200 would."""
    device: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: (HOPPER.major, HOPPER.minor),
        "get_device_properties": lambda *_: HOPPER,
        "device": lambda *_: contextlib.nullcontext(),
    }
    init_device_reg()
    init_backend_registration()
    DeviceProperties.create.cache_clear()
    with contextlib.ExitStack() as stack, _device_guard():
        for patch in (
            mock.patch.multiple(torch.cuda, **device),
            mock.patch.object(CudaInterface, "get_device_properties", return_value=HOPPER),
            mock.patch.dict(device_interfaces, {"cuda": CudaInterface, "cuda:0": CudaInterface}),
            mock.patch.object(FakeTensorMode, "avoid_device_init", True),
            mock.patch("torch._inductor.scheduler.has_triton", return_value=True),
            mock.patch("torch.utils._triton.triton_hash_with_backend", return_value=""),
            mock.patch("torch._dynamo.utils.preserve_rng_state", contextlib.nullcontext),
            # Attention and matmul patterns are traced on real tensors of the device.
            mock.patch("torch._inductor.fx_passes.joint_graph.lazy_init", return_value=None),
            mock.patch.object(GraphLowering, "_compile_to_module_lines", _stop),
        ):
            stack.enter_context(patch)
        yield
    DeviceProperties.create.cache_clear()


def cuda_wrapper(fn: Callable[..., Any], *specs: Spec, tokens: int = 64) -> str:
    """The Python module Inductor would write for `fn`; `tokens` is the dynamic size's hint."""
    mode = FakeTensorMode(shape_env=symbolic_shapes.ShapeEnv(), allow_non_fake_inputs=True)
    dynamic: Any = symbolic_shapes.StatelessSymbolicContext(
        dynamic_sizes=[symbolic_shapes.DimDynamic.DYNAMIC]
    )
    size = mode.from_tensor(torch.empty(tokens), symbolic_context=dynamic).shape[0]

    def outputs(*inputs: torch.Tensor) -> tuple[Any, ...]:
        result = fn(*inputs)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    with pretend_hopper(), torch.no_grad(), config.patch(_OPTIONS):
        with mode:
            args = [
                torch.empty([size if n is None else n for n in shape], dtype=dtype, device="cuda:0")
                for dtype, shape in specs
            ]
            graph = make_fx(outputs, decomposition.select_decomp_table())(*args)
        with torch._guards.tracing(torch._guards.TracingContext(mode)):
            try:
                compile_fx.compile_fx_inner(compile_fx._recursive_joint_graph_passes(graph), args)
            except _Generated as done:
                return str(done)
    raise AssertionError("Inductor returned without generating code")


def cuda_kernels(fn: Callable[..., Any], *specs: Spec, tokens: int = 64) -> list[str]:
    """One text per launch, in order: a Triton kernel's source, or an extern call's line."""
    source = cuda_wrapper(fn, *specs, tokens=tokens)
    kernels = dict(_KERNEL.findall(source))
    calls = _CALL.findall(source.split("def call(", 1)[1].split("\ndef ", 1)[0])
    return [kernels[name] if name else extern.strip() for name, extern in calls]

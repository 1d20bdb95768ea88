"""Part `gemm`: our kernels against bf16, W4A16, W8A8 and FP8 products, over numbers of tokens.

The product alone is timed: activations are codes already, as they are behind a norm. All that runs
one shape is timed in turns (see `timing`), each with as many copies of its weights as keep them out
of the GPU's cache. A cell is one shape and one M; `limits` is what the machine can do at most.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.common.device import Device
from benchmarks.common.random_linears import (
    generator_on,
    laid_out,
    make_codes,
    make_random_words,
    make_token_step,
)
from benchmarks.common.result_cells import Record, Refused, sentence
from benchmarks.common.shapes import GPU_MODELS, Linear, distinct
from benchmarks.gpu.context import Context
from benchmarks.gpu.gemm.baselines import BASELINES, calls
from benchmarks.gpu.gemm.limits import measure_limits
from benchmarks.gpu.timing import ROUND_SECONDS, ROUNDS, Call, compare
from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.linear.humming.kernel import HummingInt4Linear, HummingInt8Linear
from mergequant_vllm.kernels.linear.spec import LinearKernel, LinearSpec, PreparedLinear
from mergequant_vllm.kernels.selection.linears import LINEAR_KERNELS

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SMOKE_TOKENS = (1, 2)
# The definition is not meant to be fast. Stream-K rounds differently and is a choice of its own.
OURS: dict[str, LinearKernel] = {
    **{name: kernel for name, kernel in LINEAR_KERNELS.items() if name != "reference"},
    "humming-int8 stream-k": HummingInt8Linear(stream_k=True),
    "humming-int4 stream-k": HummingInt4Linear(stream_k=True),
}
CACHES = 3  # the copies of one subject's weights take so many times the cache
MOST_COPIES = 64

Ready = Callable[[int], Sequence[Call]]  # from M to the calls


def run(context: Context) -> None:
    """Measure every shape and M that is not done."""
    if context.cells.pending(["limits"]):
        context.measure("limits", lambda: measure_limits(context.device, smoke=context.smoke))
    tokens = SMOKE_TOKENS if context.smoke else TOKENS
    models = ("tiny",) if context.smoke else context.options.get("models") or GPU_MODELS
    for title, linear in distinct(tuple(models)):
        keys = {f"{title} M={m}": m for m in tokens}
        wanted = context.cells.pending(keys)
        if not wanted:
            continue
        subjects = Subjects(linear, context.device, kernels=context.options.get("kernels"))
        for key in wanted:
            context.measure(key, functools.partial(_cell, context, subjects, key, keys[key]))


def _cell(context: Context, subjects: "Subjects", key: str, m: int) -> Record:
    linear = subjects.linear
    results = compare(
        {name: functools.partial(subjects.calls, name, m) for name in subjects.names},
        context.device,
        rounds=1 if context.smoke else ROUNDS,
        round_seconds=0 if context.smoke else ROUND_SECONDS,
        dead=context.cells.dead(key),
    )
    for name, cell in results.items():
        cell.update(cost(name, linear, m))
    times = ", ".join(f"{name} {cell['us']:.1f}" for name, cell in results.items() if "us" in cell)
    print(f"  {key}, us: {times}", flush=True)
    return {"n": linear.n, "k": linear.k, "m": m, "dynamic": linear.dynamic, "subjects": results}


def cost(name: str, linear: Linear, m: int) -> dict[str, Any]:
    """Cost of a subject at least: bytes moved, operations, whose peak bounds it."""
    baseline = BASELINES.get(name)
    if baseline is not None:
        weight, activation, arithmetic = (
            baseline.weight_bits,
            baseline.activation_bits,
            baseline.arithmetic,
        )
    else:
        weight = {"cutlass-int8": 8, "cpu-fp32": 32}.get(name, 4)
        activation = {CodeLayout.NIBBLES: 4, CodeLayout.INT8: 8, CodeLayout.FLOAT32: 32}[
            OURS[name].layout
        ]
        arithmetic = "int8"
    return {
        "weight_bytes": linear.n * linear.k * weight // 8,
        "activation_bytes": m * (linear.k * activation // 8 + linear.n * 2),
        "operations": 2 * m * linear.n * linear.k,
        "arithmetic": arithmetic,
    }


class Subjects:
    """All that runs one linear, prepared when first asked for and kept for every M."""

    def __init__(
        self,
        linear: Linear,
        device: Device,
        *,
        spec: LinearSpec | None = None,
        kernels: Sequence[str] | None = None,
    ) -> None:
        self.linear, self.device = linear, device
        self.spec = spec or make_spec(linear, device)
        self.names = (*BASELINES, *(name for name in OURS if kernels is None or name in kernels))
        self._ready: dict[str, Ready | Exception] = {}

    def calls(self, name: str, m: int) -> Sequence[Call]:
        """One call for each copy of the weights; raises why there are none."""
        if name not in self._ready:
            try:
                self._ready[name] = self._baseline(name) if name in BASELINES else self._ours(name)
            except Exception as error:  # raised below, for this M and the others
                self._ready[name] = error
        ready = self._ready[name]
        if isinstance(ready, Refused):
            raise ready
        if isinstance(ready, Exception):
            raise RuntimeError(f"preparing it failed: {sentence(ready)}") from ready
        return ready(m)

    def _copies(self, name: str) -> int:
        size = int(cost(name, self.linear, 1)["weight_bytes"])
        return max(1, min(MOST_COPIES, math.ceil(CACHES * self.device.l2_bytes / size)))

    def _baseline(self, name: str) -> Ready:
        baseline, (_, n, k, _) = BASELINES[name], self.linear
        generator = generator_on(self.device, 0)
        copies = [baseline.make(n, k, generator) for _ in range(self._copies(name))]
        return lambda m: calls(copies, baseline.inputs(m, k, generator))

    def _ours(self, name: str) -> Ready:
        kernel, spec = OURS[name], self.spec
        refusal = kernel.refusal(spec)
        if refusal is not None:
            raise Refused(refusal)
        generator = generator_on(self.device, 0)
        copies = [
            kernel.prepare(make_random_words(spec, generator), spec)
            for _ in range(self._copies(name))
        ]
        return lambda m: _product_calls(copies, kernel.layout, spec, m, generator)


def make_spec(linear: Linear, device: Device) -> LinearSpec:
    """The linear as the server has it: W4A4, per channel, bfloat16."""
    return LinearSpec(
        in_features=linear.k,
        out_features=linear.n,
        weight_bits=4,
        activation_bits=4,
        dynamic=linear.dynamic,
        device=device.kind,
        dtype=torch.bfloat16,
        capability=device.capability,
    )


def _product_calls(
    copies: Sequence[PreparedLinear],
    layout: CodeLayout,
    spec: LinearSpec,
    m: int,
    generator: torch.Generator,
) -> Sequence[Call]:
    codes = make_codes((m, spec.in_features), spec.activation_bits, "random", generator)
    given = laid_out(codes, layout, copies[0].columns)
    step = make_token_step(m, generator) if spec.dynamic else None
    return [functools.partial(copy, given, step, None, False) for copy in copies]

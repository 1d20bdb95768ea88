"""Part `profile`: where the time of our engine goes, by PyTorch's profiler.

Time that an operator spends itself, without those that it calls, belongs to the group of the
nearest operator above it that has one. The compiler is told to name its loops, which it does not
do otherwise.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.common.shapes import MODELS
from benchmarks.cpu.serve.measure import SHORT_PROMPT
from benchmarks.cpu.serve.vllm_engine import VllmEngine

LINEARS = "integer linears, the head among them"
TOKENS, NORMS = "quantizing each token", "norms and static rounding"
ATTENTION, ELEMENTWISE = "attention and its cache", "activation functions, rotary embedding"
HEAD, EMBEDDING, CALLS = "head", "embedding", "calls within the compiled graph"
OPERATORS, PYTHON = "other operators (inputs, sampling)", "outside of operators (scheduler)"
# The first whose word is part of an operator's name decides.
GROUPS = (
    ("integer_linear_cpu", LINEARS),
    ("token_linear_cpu", LINEARS),
    ("token_quant", TOKENS),
    ("hadamard", TOKENS),
    ("static_round", NORMS),
    ("attention", ATTENTION),
    ("kv_cache", ATTENTION),
    ("reshape_and_cache", ATTENTION),
    ("rms_norm", NORMS),
    ("silu_and_mul", ELEMENTWISE),
    ("rotary_embedding", ELEMENTWISE),
    ("aten::embedding", EMBEDDING),
    ("CompiledFxGraph", CALLS),
)
MATRIX_PRODUCTS = (
    "onednn_mm",
    "aten::linear",
    "aten::addmm",
    "aten::mm",
    "mkl_linear",
    "weight_packed_linear",
)
LOOP = "cpp_fused"


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the engine; a row for prefill and one for decoding at batch 1.

    Returns:
        `phase`, `seconds` of it without the profiler, `profiled` with it, `groups`:
        seconds by group, all of one prefill or one decoded token.
    """
    layers = options.layers or MODELS[options.model].num_hidden_layers
    context = max(options.prefill, SHORT_PROMPT + options.decode) + 16
    given = argparse.Namespace(
        variant=options.variant,
        model=options.model,
        layers=layers,
        context=context,
        batch=1,
        isa=options.isa,
        no_amx=options.no_amx,
    )
    named = {"inductor_compile_config": {"cpp.enable_kernel_profile": True}}
    with tempfile.TemporaryDirectory() as scratch:
        engine = VllmEngine(given, Path(scratch), compilation_config=named)
        prefill = (options.prefill, 1)
        first, whole = (SHORT_PROMPT, 1), (SHORT_PROMPT, 1 + options.decode)
        for work in (prefill, first):
            engine.generate(1, *work)
        measured = {
            work: _measure(engine, work, options.rounds) for work in (prefill, first, whole)
        }
    rows = [_row(f"prefill of {options.prefill} tokens", 1, measured[prefill], None)]
    rows.append(_row("one decoded token", options.decode, measured[whole], measured[first]))
    return rows


def _measure(engine: VllmEngine, work: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Mean seconds of one `generate` without and with the profiler, and by group."""
    begin = time.perf_counter()
    for _ in range(rounds):
        engine.generate(1, *work)
    plain = (time.perf_counter() - begin) / rounds
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        begin = time.perf_counter()
        for _ in range(rounds):
            engine.generate(1, *work)
        profiled = (time.perf_counter() - begin) / rounds
    groups = {name: taken / rounds for name, taken in by_group(trace.events()).items()}
    groups[PYTHON] = max(profiled - sum(groups.values()), 0.0)
    return {"seconds": plain, "profiled": profiled, "groups": groups}


def _row(
    phase: str, steps: int, times: Mapping[str, Any], less: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Subtract `less` from `times`, for one of `steps`."""
    row: dict[str, Any] = {"phase": phase}
    for key in ("seconds", "profiled"):
        row[key] = (times[key] - (less[key] if less else 0.0)) / steps
    names = dict.fromkeys((*times["groups"], *(less["groups"] if less else ())))
    row["groups"] = {
        name: (times["groups"].get(name, 0.0) - (less["groups"].get(name, 0.0) if less else 0.0))
        / steps
        for name in names
    }
    return row


def by_group(events: Iterable[Any]) -> dict[str, float]:
    """Seconds by group, from the profiler's events."""
    seconds: dict[str, float] = {}
    for event in events:
        name = group_of(event)
        seconds[name] = seconds.get(name, 0.0) + event.self_cpu_time_total * 1e-6
    return seconds


def group_of(event: Any) -> str:
    """The group of an event: its own, or that of the nearest above it that has one."""
    at = event
    while at is not None:
        group = own_group(at.name)
        if group is not None:
            return group
        if any(word in at.name for word in MATRIX_PRODUCTS):
            return LINEARS if _compiled(at) else HEAD
        at = at.cpu_parent
    return OPERATORS


def own_group(name: str) -> str | None:
    """Group that an operator's name tells; loops of the compiler carry their operations."""
    if LOOP in name:
        return NORMS if "rsqrt" in name else ELEMENTWISE
    for word, group in GROUPS:
        if word in name:
            return group
    return None


def _compiled(event: Any) -> bool:
    at = event.cpu_parent
    while at is not None:
        if "CompiledFxGraph" in at.name:
            return True
        at = at.cpu_parent
    return False

"""Engines of part `trace`, one after the other, in a process; prints `CELL depth json` for each.

Counts of kernels: of a prefill alone, and of a prefill and `STEPS` further tokens.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.shapes import MODELS
from benchmarks.common.vllm_engine import generate, linear_kernels, prompts, start

PROMPT, STEPS = 16, 8


def main() -> None:
    """Trace at every depth."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--blocks", type=int, nargs="+", required=True)
    parser.add_argument("--attention")
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    for blocks in options.blocks:
        print(f"CELL {blocks} {json.dumps(counted(options, blocks))}", flush=True)


def counted(options: argparse.Namespace, blocks: int) -> dict[str, Any]:
    """Start an engine of so many blocks, warm up, trace twice; the engine is gone afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        llm = start(
            options.variant,
            options.model,
            Path(scratch),
            blocks=blocks,
            context=128,
            attention_backend=options.attention,
            enforce_eager=options.eager,
            # Compiled, but launched one by one: the profiler sees the same kernels by name.
            compilation_config=None if options.eager else {"cudagraph_mode": "NONE"},
            max_num_seqs=2,
            gpu_memory_utilization=None,
            kv_cache_memory_bytes=2**28,
            async_scheduling=False,
        )
        inputs = prompts(1, PROMPT, MODELS[options.model].vocab_size, seed=0)
        generate(llm, inputs, 1 + STEPS)
        counts: dict[str, Any] = {"kernels": linear_kernels(llm), "steps": STEPS}
        counts["prefill"] = traced(llm, inputs, 1)
        counts["all"] = traced(llm, inputs, 1 + STEPS)
        llm.llm_engine.engine_core.shutdown()
    return counts


def traced(llm: Any, inputs: list[Any], tokens: int) -> dict[str, int]:
    """How often each kernel ran; on a CPU, each of PyTorch's operations."""
    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as trace:
        generate(llm, inputs, tokens)
        if gpu:
            torch.cuda.synchronize()
    kind = "CUDA" if gpu else "CPU"
    names = [event.name for event in trace.events() if event.device_type.name == kind]
    return dict(Counter(name for name in names if not name.startswith(("Memcpy", "Memset"))))


if __name__ == "__main__":
    main()

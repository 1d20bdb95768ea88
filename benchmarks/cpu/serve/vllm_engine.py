"""vLLM in this process on a model of random weights, for parts `serve` and `profile`."""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common.shapes import MODELS
from benchmarks.cpu.instruction_sets import hide_newer
from benchmarks.cpu.machine import status_bytes
from benchmarks.cpu.serve.variants import VARIANTS

CACHE_BYTES = 2**30


class VllmEngine:
    """`vllm.LLM`, its engine in this process: its threads are those of OMP_NUM_THREADS.

    vLLM binds threads to cores only in workers that it starts; here GOMP_CPU_AFFINITY does.
    """

    def __init__(self, options: argparse.Namespace, scratch: Path, **more: Any) -> None:
        hide_newer(options.isa, amx=not options.no_amx)
        from benchmarks.common.vllm_engine import start

        variant = VARIANTS[options.variant]
        assert variant.served is not None
        self.vocabulary = MODELS[options.model].vocab_size
        self.llm = start(
            variant.served,
            options.model,
            scratch,
            blocks=options.layers,
            context=options.context,
            dtype=variant.dtype,
            max_num_seqs=options.batch,
            gpu_memory_utilization=None,
            kv_cache_memory_bytes=CACHE_BYTES,
            **more,
        )

    def generate(self, batch: int, prompt: int, tokens: int) -> int:
        """How many tokens came."""
        from benchmarks.common.vllm_engine import generate, prompts

        return generate(self.llm, prompts(batch, prompt, self.vocabulary, seed=batch), tokens)

    def facts(self) -> dict[str, Any]:
        """Memory in bytes, and what runs the linears."""
        from benchmarks.common.vllm_engine import linear_kernels, model_bytes

        return {
            "resident": status_bytes("VmRSS"),
            "model_bytes": model_bytes(self.llm),
            "cache_bytes": CACHE_BYTES,
            "engine": ", ".join(sorted(set(linear_kernels(self.llm).values()))),
        }

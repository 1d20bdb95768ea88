"""One variant of part `serve` in a process of its own; prints a line `CELL batch json` a batch.

Prefill is the time until every sequence has its first token; decode is the rest of the whole.
Before a batch is timed it runs once.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.result_cells import Refused, sentence
from benchmarks.common.served_variants import FP8_CACHE
from benchmarks.common.shapes import MODELS, Model
from benchmarks.common.vllm_engine import generate, linear_kernels, model_bytes, prompts, start

SHORT_SECONDS = 4.0  # batches that take less are repeated
REPEATS = 3


def main() -> None:
    """Start the engine, then one batch after another while there is time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batches", nargs="+", type=int, required=True)
    parser.add_argument("--prefill", type=int, required=True)
    parser.add_argument("--decode", type=int, required=True)
    parser.add_argument("--attention")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--end", type=float, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        begin = time.time()
        llm = _start(options, Path(scratch))
        facts = {
            "start_seconds": round(time.time() - begin, 1),
            "model_bytes": model_bytes(llm),
            "kernels": linear_kernels(llm),
            "settings": _settings(llm),
        }
        print(f"NOTE {options.variant}: engine up in {facts['start_seconds']} s", flush=True)
        for batch in sorted(options.batches):
            if time.time() >= options.end:
                return
            try:
                cell = {**facts, **measure(llm, batch, options)}
            except Refused as reason:
                cell = {"refused": str(reason)}
            except Exception as error:
                cell = {"failed": sentence(error)}
            print(f"CELL {batch} {json.dumps(cell)}", flush=True)


def _settings(llm: Any) -> dict[str, str]:
    """Settings that vLLM chose by itself or was told."""
    config = llm.llm_engine.vllm_config
    return {
        "tokens a step": str(config.scheduler_config.max_num_batched_tokens),
        "attention": str(getattr(getattr(config, "attention_config", None), "backend", None)),
        "graphs": str(config.compilation_config.cudagraph_mode),
        "asynchronous": str(config.scheduler_config.async_scheduling),
    }


def _start(options: argparse.Namespace, scratch: Path) -> Any:
    batches = sorted(options.batches)
    return start(
        options.variant,
        options.model,
        scratch,
        blocks=MODELS[options.model].num_hidden_layers,
        context=options.prefill + options.decode + 16,
        attention_backend=options.attention,
        enforce_eager=options.eager,
        max_num_seqs=batches[-1],
        cudagraph_capture_sizes=batches,
        gpu_memory_utilization=0.9 if torch.cuda.is_available() else None,
        # No more cache than is used: starting is faster, and CPUs have no room.
        kv_cache_memory_bytes=None if torch.cuda.is_available() else 2**28,
    )


def measure(llm: Any, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Times and memory of one batch."""
    model, total = MODELS[options.model], options.prefill + options.decode
    cache = cache_tokens(llm)
    if cache is not None and cache < batch * total:
        raise Refused(f"the cache holds {cache} tokens and the batch needs {batch * total}")
    inputs = prompts(batch, options.prefill, model.vocab_size, seed=batch)
    generate(llm, inputs, 2)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    prefill: list[float] = []
    whole: list[float] = []
    while not whole or (len(whole) < REPEATS and whole[-1] < SHORT_SECONDS):
        prefill.append(_seconds(llm, inputs, 1))
        whole.append(_seconds(llm, inputs, options.decode))
    figures = speeds(batch, options.prefill, options.decode, prefill, whole)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        figures["peak_bytes"] = peak
        if cache is not None:
            one = cache_bytes_per_token(model, options.variant)
            figures["peak_without_cache_bytes"] = peak - cache * one
            figures["cache_bytes_per_token"] = one
    return figures


def speeds(
    batch: int, prefill: int, decode: int, prefill_seconds: list[float], seconds: list[float]
) -> dict[str, Any]:
    """Medians, and tokens a second of each phase; the first token belongs to the prefill."""
    first, whole = statistics.median(prefill_seconds), statistics.median(seconds)
    return {
        "batch": batch,
        "prefill": prefill,
        "decode": decode,
        "prefill_seconds": first,
        "whole_seconds": whole,
        "prefill_tokens_per_second": batch * prefill / first,
        "decode_tokens_per_second": batch * (decode - 1) / max(whole - first, 1e-9),
        "all_prefill_seconds": prefill_seconds,
        "all_whole_seconds": seconds,
    }


def _seconds(llm: Any, inputs: list[Any], tokens: int) -> float:
    begin = time.perf_counter()
    came = generate(llm, inputs, tokens)
    taken = time.perf_counter() - begin
    if came != tokens * len(inputs):
        raise RuntimeError(f"{came} tokens came instead of {tokens * len(inputs)}")
    return taken


def cache_tokens(llm: Any) -> int | None:
    """How many tokens the key-value cache holds."""
    cache = llm.llm_engine.vllm_config.cache_config
    blocks = getattr(cache, "num_gpu_blocks", None)
    return None if not blocks else int(blocks) * int(cache.block_size)


def cache_bytes_per_token(model: Model, variant: str) -> int:
    """Keys and values of all blocks."""
    width = 1 if variant.endswith(FP8_CACHE) else 2
    return 2 * width * model.num_hidden_layers * model.key_value_size


if __name__ == "__main__":
    main()

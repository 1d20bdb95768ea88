"""One variant of part `serve` in a process of its own, for requests `BATCH PROMPT TOKENS`.

The first reply needs no request: what the engine is and how much memory it has taken. The reply to
a request is the time that BATCH sequences with prompts of PROMPT random tokens each took to get
TOKENS tokens more.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cpu.serve.child_process import reply, requests
from benchmarks.cpu.serve.variants import VARIANTS

WARM_UP = (16, 2)  # tokens of the prompt, tokens generated


def main() -> None:
    """Start the engine and serve requests until the input ends."""
    options = make_parser().parse_args()
    use_all_cores()
    with tempfile.TemporaryDirectory() as scratch:
        engine = start(options, Path(scratch))
        for batch in sorted({1, options.batch}):
            engine.generate(batch, *WARM_UP)
        reply(engine.facts())
        for request in requests():
            reply(measure(engine, *map(int, request.split())))


def use_all_cores(bound: str | None = None) -> None:
    """Take the cores that threads will be bound to; before OpenMP is loaded.

    The process that starts this one has OpenMP loaded, which has bound it to its first core. A
    child that inherits that counts one core, and its idle threads sleep at once, not waiting.
    """
    bound = os.environ.get("GOMP_CPU_AFFINITY", "") if bound is None else bound
    if bound:
        os.sched_setaffinity(0, {int(core) for core in bound.split()})


def make_parser() -> argparse.ArgumentParser:
    """Command line as `measure.RunningVariant` writes it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--isa")
    parser.add_argument("--no-amx", action="store_true")
    return parser


def start(options: argparse.Namespace, scratch: Path) -> Any:
    """Start the variant's engine; the processes of those outside vLLM never load PyTorch."""
    variant = VARIANTS[options.variant]
    if variant.served is None and variant.peer == "ik_llama.cpp":
        from benchmarks.cpu.serve.ik_llama_engine import IkLlamaEngine

        return IkLlamaEngine(options, scratch)
    if variant.served is None and variant.peer == "openvino":
        from benchmarks.cpu.serve.openvino_engine import OpenVinoEngine

        return OpenVinoEngine(options, scratch)
    if variant.served is None:
        from benchmarks.cpu.serve.llama_engine import LlamaEngine

        return LlamaEngine(options, scratch)
    from benchmarks.cpu.serve.vllm_engine import VllmEngine

    return VllmEngine(options, scratch)


def measure(engine: Any, batch: int, prompt: int, tokens: int) -> dict[str, Any]:
    """Seconds that a batch took; raises RuntimeError unless every token came."""
    begin = time.perf_counter()
    came = engine.generate(batch, prompt, tokens)
    taken = time.perf_counter() - begin
    if came != batch * tokens:
        raise RuntimeError(f"{came} tokens came instead of {batch * tokens}")
    return {"seconds": taken}


if __name__ == "__main__":
    main()

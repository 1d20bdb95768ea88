"""One contender of part `serve` in a process of its own; answers `BATCH PROMPT TOKENS`.

The first answer comes by itself: what the engine is and how much memory it has taken. An answer to
a question is the time that BATCH sequences with prompts of PROMPT random tokens each took to get
TOKENS tokens more.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cpu.serve.baselines import CONTENDERS
from benchmarks.cpu.serve.child_dialogue import answer, questions

WARM_UP = (16, 2)  # tokens of the prompt, tokens generated


def main() -> None:
    """Start the engine, answer until the input ends."""
    options = parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        engine = start(options, Path(scratch))
        for batch in sorted({1, options.batch}):
            engine.generate(batch, *WARM_UP)
        answer(engine.facts())
        for question in questions():
            answer(measure(engine, *map(int, question.split())))


def parser() -> argparse.ArgumentParser:
    """The command line, as `serve.run` writes it."""
    found = argparse.ArgumentParser()
    found.add_argument("--contender", choices=CONTENDERS, required=True)
    found.add_argument("--model", required=True)
    found.add_argument("--layers", type=int, required=True)
    found.add_argument("--context", type=int, required=True)
    found.add_argument("--batch", type=int, required=True)
    found.add_argument("--threads", type=int, required=True)
    found.add_argument("--isa")
    found.add_argument("--no-amx", action="store_true")
    return found


def start(options: argparse.Namespace, scratch: Path) -> Any:
    """The engine of the contender; llama.cpp's process never loads PyTorch."""
    if CONTENDERS[options.contender].method is None:
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

"""OpenVINO GenAI on the same file as llama.cpp, whose blocks it takes into its own 4-bit form."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.shapes import MODELS
from benchmarks.cpu.instruction_sets import find_instruction_set
from benchmarks.cpu.machine import status_bytes
from benchmarks.cpu.serve.llama_file import write
from benchmarks.cpu.serve.variants import VARIANTS

CACHE_BYTES_PER_NUMBER = 1  # its default


class OpenVinoEngine:
    """One pipeline of OpenVINO GenAI; RuntimeError if it does not load the file."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        if find_instruction_set(options.isa).environment:
            raise RuntimeError("it chooses its instruction set itself, and no variable holds it")
        import openvino_genai as library  # type: ignore[import-not-found]

        self.library = library
        self.model, self.layers = MODELS[options.model], options.layers
        self.tokens = options.context * options.batch
        form = VARIANTS[options.variant].file
        path = scratch / "model.gguf"
        write(path, self.model, self.layers, options.context, form, vocabulary=True)
        self.file_bytes = path.stat().st_size
        settings = {"INFERENCE_NUM_THREADS": options.threads}
        self.pipeline = library.LLMPipeline(str(path), "CPU", **settings)
        path.unlink()

    def generate(self, batch: int, prompt: int, tokens: int) -> int:
        """Greedily; how many tokens came."""
        import openvino  # type: ignore[import-not-found]

        ids = np.random.default_rng(batch).integers(5, self.model.vocab_size, (batch, prompt))
        given = [openvino.Tensor(array) for array in (ids, np.ones_like(ids))]
        wanted = self.library.GenerationConfig(max_new_tokens=tokens, ignore_eos=True)
        done = self.pipeline.generate(self.library.TokenizedInputs(*given), wanted)
        return sum(map(len, done.tokens))

    def facts(self) -> dict[str, Any]:
        """Memory in bytes, and version."""
        numbers = 2 * self.layers * self.model.key_value_size * self.tokens
        return {
            "resident": status_bytes("VmRSS"),
            "model_bytes": self.file_bytes,
            "cache_bytes": CACHE_BYTES_PER_NUMBER * numbers,
            "engine": f"OpenVINO GenAI {self.library.__version__}",
        }

"""llama.cpp on a file of random weights, by llama-cpp-python's low-level interface.

This process imports no PyTorch. The library was built for certain instruction sets, which no
variable takes back: one that was built for newer ones than are to be compared is refused.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.shapes import MODELS
from benchmarks.cpu.instruction_sets import find_instruction_set
from benchmarks.cpu.machine import status_bytes
from benchmarks.cpu.serve.llama_file import write
from benchmarks.cpu.serve.variants import VARIANTS

CACHE_BYTES_PER_NUMBER = 2  # float16


class LlamaEngine:
    """One model and one context of llama.cpp.

    Raises:
        RuntimeError: it was built for other instruction sets, or does not load the file.
    """

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.library = self._import()
        self.system = self._refuse(options)
        self.model_of = MODELS[options.model]
        self.layers = options.layers
        form = VARIANTS[options.variant].file
        path = write(scratch / "model.gguf", self.model_of, options.layers, options.context, form)
        self.file_bytes = path.stat().st_size
        self.tokens = options.context * options.batch
        self._load(path, options)
        path.unlink()

    def _import(self) -> Any:
        import llama_cpp  # type: ignore[import-not-found]

        return llama_cpp

    def _refuse(self, options: argparse.Namespace) -> str:
        """What the library says of itself; RuntimeError if it uses what is not to be used."""
        system = str(self.library.llama_print_system_info().decode())
        refuse_newer(system, options.isa, amx=not options.no_amx)
        return system

    def _load(self, path: Path, options: argparse.Namespace) -> None:
        library = self.library
        library.llama_backend_init()
        given = library.llama_model_default_params()
        given.use_mmap = False  # else what it repacks is in memory twice
        self._set_model(given)
        self.model = library.llama_model_load_from_file(str(path).encode(), given)
        if not self.model:
            raise RuntimeError("the library does not load the file")
        context = library.llama_context_default_params()
        context.n_ctx, context.n_seq_max = self.tokens, options.batch
        context.n_batch = context.n_ubatch = 512
        context.n_threads = context.n_threads_batch = options.threads
        self._set_context(context)
        self.context = library.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError("the library makes no context")
        self.batch = library.llama_batch_init(self.tokens, 0, 1)

    def _set_model(self, given: Any) -> None:
        """Parameters of the model beside those that every engine here has."""

    def _set_context(self, given: Any) -> None:
        """Parameters of the context, likewise."""

    def generate(self, batch: int, prompt: int, tokens: int) -> int:
        """Greedily; how many tokens came."""
        self._clear()
        generator = np.random.default_rng(batch)
        ids = generator.integers(5, self.model_of.vocab_size, (batch, prompt))
        given = [[int(token) for token in row] for row in ids]
        came = 0
        for position in (0, *range(prompt, prompt + tokens - 1)):
            best = self._decode(given, position)
            came += len(best)
            given = [[token] for token in best]
        return came

    def _clear(self) -> None:
        library = self.library
        library.llama_memory_clear(library.llama_get_memory(self.context), True)

    def _decode(self, sequences: list[list[int]], position: int) -> list[int]:
        """Run tokens that follow `position` tokens of each sequence; the next token of each."""
        batch, at = self.batch, 0
        last = []
        for sequence, tokens in enumerate(sequences):
            for offset, token in enumerate(tokens):
                batch.token[at], batch.pos[at] = token, position + offset
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = offset == len(tokens) - 1
                at += 1
            last.append(at - 1)
        batch.n_tokens = at
        status = self.library.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        width = self.model_of.vocab_size
        rows = (self.library.llama_get_logits_ith(self.context, row) for row in last)
        return [int(np.ctypeslib.as_array(row, (width,)).argmax()) for row in rows]

    def facts(self) -> dict[str, Any]:
        """Memory in bytes, version and instruction sets."""
        model, width = self.model_of, CACHE_BYTES_PER_NUMBER
        held = self._held()
        return {
            "resident": status_bytes("VmRSS"),
            "model_bytes": self.file_bytes,
            "cache_bytes": 2 * width * self.layers * model.key_value_size * held,
            "engine": self._version(),
        }

    def _held(self) -> int:
        """Tokens that the cache has room for."""
        return int(self.library.llama_n_ctx(self.context))

    def _version(self) -> str:
        """Release, and instruction sets."""
        switched_on = [
            part.strip() for part in self.system.split("|") if part.strip().endswith("1")
        ]
        names = [part.split("=")[0].split(":")[-1].strip() for part in switched_on]
        return f"llama-cpp-python {self.library.__version__}: {' '.join(names)}"


def refuse_newer(system: str, isa: str | None, *, amx: bool) -> None:
    """Raise RuntimeError if llama.cpp, by what it says of itself, uses more than is to be used."""
    restricted = bool(find_instruction_set(isa).environment)
    too_new = ["AVX512", "AMX"] if restricted else [] if amx else ["AMX"]
    used = [name for name in too_new if f"{name} = 1" in system or f"{name}_INT8 = 1" in system]
    if used:
        raise RuntimeError(
            f"this llama.cpp was built for {used[0]}, which is not to be used: build one with "
            "CMAKE_ARGS='-DGGML_NATIVE=OFF -DGGML_AVX2=ON' python -m benchmarks.cpu peers in a "
            "folder of its own"
        )

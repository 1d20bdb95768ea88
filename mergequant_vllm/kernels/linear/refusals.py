"""Why a kernel cannot serve a linear, where several kernels say it alike.

Each function gives a clause about the kernel, or None. A clause is never empty, so that a kernel's
`refusal` is these with `or` between them: the first reason counts.
"""

import torch

from mergequant_vllm.kernels.capability import spell
from mergequant_vllm.kernels.linear.spec import LinearSpec


def device(spec: LinearSpec) -> str | None:
    """The layer is not on a GPU."""
    if spec.device == "cuda":
        return None
    return f"it runs on NVIDIA GPUs and the layer is on {spec.device}"


def cpu(spec: LinearSpec) -> str | None:
    """The layer is not on the CPU."""
    return None if spec.device == "cpu" else f"it runs on the CPU and the layer is on {spec.device}"


def capability(given: int | None, oldest: int) -> str | None:
    """The GPU's compute capability, if it is known, is below `oldest`."""
    if given is None or given >= oldest:
        return None
    return f"it needs compute capability {spell(oldest)} and the GPU has {spell(given)}"


def dtype(spec: LinearSpec) -> str | None:
    """The model is not in 16 bits."""
    if spec.dtype in (torch.bfloat16, torch.float16):
        return None
    return (
        f"it writes bfloat16 or float16 and the model is in {spec.dtype_name}; use --dtype bfloat16"
    )


def groups(spec: LinearSpec) -> str | None:
    """Input channels have steps of their own."""
    wants = "it takes a step per output channel"
    if spec.segments is not None:
        return f"{wants}, the layer has {spec.groups} segments"
    return (
        None if spec.group_size is None else f"{wants}, the layer has groups of {spec.group_size}"
    )


def segments(spec: LinearSpec) -> str | None:
    """Weight steps belong to runs of unequal lengths."""
    if spec.segments is None:
        return None
    return f"it takes no segments of input channels and the layer has {spec.groups}"


def token_zero_points(spec: LinearSpec) -> str | None:
    """Activations have zero points per token."""
    if not spec.token_zero_points:
        return None
    return "it takes no zero points of activations and the layer's tokens have them"


def sums(spec: LinearSpec, most: int) -> str | None:
    """Some step's channels are more than `most`, up to which the kernel's sums are exact."""
    if spec.longest_span <= most:
        return None
    return f"its sums are exact up to {most} channels and the layer adds {spec.longest_span}"


def zero_points(spec: LinearSpec) -> str | None:
    """Weight codes have zero points."""
    return "it takes no zero points and the layer has them" if spec.zero_points else None


def operations(*names: str) -> str | None:
    """vLLM or one of its compiled operations is missing."""
    try:
        from vllm import _custom_ops  # noqa: F401
    except ImportError as error:
        return f"vLLM cannot be imported ({error})"
    for name in names:
        if not hasattr(torch.ops._C, name):
            return f"this build of vLLM has no operation {name}; install vLLM for CUDA"
    return None

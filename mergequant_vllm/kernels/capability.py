"""The compute capability of an NVIDIA GPU as one number, 10 * major + minor: 9.0 is 90."""

import torch


def read_capability(device: torch.device | int | None = None) -> int:
    """Compute capability of a CUDA device; None means the current one."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def current_capability(device: str) -> int | None:
    """Compute capability of the current NVIDIA GPU if `device` is `cuda`; None elsewhere."""
    if device != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    return read_capability()


def spell(capability: int) -> str:
    """Return a capability as NVIDIA writes it: 90 is "9.0"."""
    return f"{capability // 10}.{capability % 10}"

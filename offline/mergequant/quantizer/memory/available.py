"""What memory is free, the refusal of a run that needs more, and what was taken."""

import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from mergequant.errors import InputError
from mergequant.quantizer.memory.needed import HIDDEN, INPUTS, MemoryNeed


def refuse_if_short(need: MemoryNeed, device: torch.device) -> None:
    """Raise InputError if the memory that is free now is known, and is less than `need`."""
    host = free_host_bytes()
    if device.type == "cpu":
        _refuse(need, need.together, host, "memory")
        return
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        _refuse(need, need.device, free, f"memory of {device}")
    if host is not None and need.host > host:
        raise InputError(
            f"Quantizing this model needs {_gib(need.host)} of host memory beside {device}, and "
            f"{_gib(host)} are free: end other programs or take a machine with more."
        )


def peak_bytes(device: torch.device) -> dict[str, int]:
    """The most memory that this process has had so far: the host's, and a GPU's by its tensors."""
    kibibytes = 1 if sys.platform == "darwin" else 1024  # what the system counts in
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kibibytes}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def _refuse(need: MemoryNeed, wanted: int, free: int | None, where: str) -> None:
    if free is None or wanted <= free:
        return
    term, size = max(need.parts.items(), key=lambda part: part[1])
    if wanted - need.parts[HIDDEN] - need.parts[INPUTS] > free:  # not even one window would do
        remedy = "the model is too wide for it, take a machine with more"
    elif term == INPUTS:
        remedy = "lower --statistics-samples or --sequence-length"
    else:
        remedy = "lower --gptq-samples and --compensation-samples, or --sequence-length"
    raise InputError(
        f"Quantizing this model needs {_gib(wanted)} of {where}, most of it ({_gib(size)}) for "
        f"{term.removeprefix('host: ')}, and {_gib(free)} are free: {remedy}."
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """What this process may still take: the system's, or its control group's if that is less.

    Args:
        root: where /proc and /sys are.

    Returns:
        bytes; None where the system does not say.
    """
    system = _fields(root / "proc/meminfo").get("MemAvailable")
    limits_bytes = [] if system is None else [system * 1024]
    for folder in _control_groups(root):
        # Version 2, then 1. Cached files count as used there, and are given up when needed.
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            most, now = _number(folder / limit), _number(folder / used)
            if most is not None and now is not None:
                cached = _fields(folder / "memory.stat").get("inactive_file", 0)
                limits_bytes.append(max(0, most - now + cached))
    return min(limits_bytes, default=None)


def _control_groups(root: Path) -> Iterator[Path]:
    """Folders of the groups that this process is in, and of the ones that hold those."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        inner = mount / path.strip("/")
        yield from (inner, *(above for above in inner.parents if above.is_relative_to(mount)))


def _fields(file: Path) -> dict[str, int]:
    """The numbers of lines such as `Name: 12 kB`."""
    lines = (line.replace(":", " ").split() for line in _text(file).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""

"""The CPU that a figure comes from: its name, cores, caches; memory of a process."""

import os
from pathlib import Path
from typing import Any

from benchmarks.cpu.instruction_sets import find_instruction_set

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE = 64 * 2**20
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def cores() -> list[int]:
    """Cores that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def cpu_name(text: str | None = None) -> str:
    """Name that the CPU's maker gave it; `text` stands for /proc/cpuinfo."""
    return _cpu_field("model name", text) or "unknown CPU"


def cpu_vendor(text: str | None = None) -> str:
    """Maker of the CPU, such as AuthenticAMD; `text` stands for /proc/cpuinfo."""
    return _cpu_field("vendor_id", text) or "unknown"


def _cpu_field(wanted: str, text: str | None) -> str:
    information = Path("/proc/cpuinfo").read_text() if text is None else text
    for line in information.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == wanted:
            return value.strip()
    return ""


def has_amx() -> bool:
    """Whether the CPU multiplies matrices in tiles."""
    return "amx_int8" in Path("/proc/cpuinfo").read_text()


def cache_bytes(folder: Path = CACHES) -> int:
    """Size of the last-level cache; 64 MiB where the kernel does not tell."""
    sizes = [to_bytes(path.read_text().strip()) for path in folder.glob("index*/size")]
    return max(sizes, default=UNKNOWN_CACHE)


def to_bytes(size: str) -> int:
    """`107520K` in bytes."""
    unit = UNITS.get(size[-1:].upper(), 0)
    return int(size[:-1]) * unit if unit else int(size)


def status_bytes(key: str) -> int:
    """`VmRSS` and the like of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}: this benchmark needs Linux")


def process_group_bytes(group: int) -> int:
    """Memory of all processes of a group; pages that several hold are counted once (Pss)."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) != group:
                continue
            lines = (folder / "smaps_rollup").read_text().splitlines()
        except (ProcessLookupError, FileNotFoundError):  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


def where(isa: str, threads: int, *, amx: bool) -> dict[str, Any]:
    """Date, CPU, instruction set, versions, for `benchmarks.common.record.save`."""
    from benchmarks.common.record import environment

    details = environment()
    off = not amx or find_instruction_set(isa).environment
    tiles = f", AMX {'switched off' if off else 'left to the others'}" if has_amx() else ""
    waiting = os.environ.get("OMP_WAIT_POLICY", "as OpenMP chooses").lower()
    details["device"] = (
        f"{cpu_name()}, {threads} of {os.cpu_count()} cores, {isa}{tiles}, "
        f"last-level cache {cache_bytes() / 2**20:.0f} MiB, waiting threads {waiting}"
    )
    return details

"""The machine that a figure comes from, and what makes a figure stale."""

import functools
import hashlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.record import environment
from mergequant_vllm.kernels.capability import read_capability

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "mergequant_vllm" / "kernels"


@dataclass(frozen=True)
class Device:
    """A device on which a part runs.

    Attributes:
        kind: torch device type, `cuda` or `cpu`.
        name: as its maker calls it.
        capability: compute capability, see `kernels.capability`; None on CPUs.
        l2_bytes: size of the cache that weights must not be read from.
        driver: version of the GPU's driver, or None.
    """

    kind: str
    name: str
    capability: int | None
    l2_bytes: int
    driver: str | None

    @property
    def is_gpu(self) -> bool:
        """Whether this is a GPU."""
        return self.kind == "cuda"

    @property
    def folder(self) -> str:
        """Name of the folder of its results."""
        return re.sub(r"[^A-Za-z0-9.-]+", "_", self.name).strip("_")


@functools.cache
def find_device() -> Device:
    """The first GPU, else the CPU."""
    if not torch.cuda.is_available():
        return Device("cpu", f"CPU {torch.backends.cpu.get_cpu_capability()}", None, 0, None)
    properties = torch.cuda.get_device_properties(0)
    cache = int(getattr(properties, "L2_cache_size", 0)) or 64 * 2**20
    return Device("cuda", torch.cuda.get_device_name(0), read_capability(0), cache, _driver())


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def where(device: Device) -> dict[str, Any]:
    """Date, device, driver and versions, as they stand at the head of each file of results."""
    found = {"device": device.name, "capability": device.capability, "driver": device.driver}
    return {**environment(), **found}


def headline(place: dict[str, Any]) -> str:
    """Date, device, driver and versions of `where` in one line, as a table's file begins."""
    versions = ", ".join(f"{name} {version}" for name, version in place["versions"].items())
    driver = f", driver {place['driver']}" if place["driver"] else ""
    return f"{place['date']}, {place['device']}{driver}; Python {place['python']}, {versions}"


def stamp(place: dict[str, Any], sources: tuple[Path, ...]) -> str:
    """Digest of what a finished figure depends on: device, driver, versions, sources.

    The date is left out, so that a run of another day goes on with what is there.
    """
    digest = hashlib.sha256()
    for key in ("device", "driver", "versions"):
        digest.update(repr(place[key]).encode())
    for source in sources:
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:12]


def kernel_sources() -> tuple[Path, ...]:
    """Return the files that our kernels' results and speed depend on."""
    return tuple(sorted(KERNELS.rglob("*.py")))


def runs_triton(device: Device) -> bool:
    """Whether Triton kernels run: compiled, or interpreted if the environment says so."""
    return device.is_gpu or os.environ.get("TRITON_INTERPRET") == "1"


def synchronize(device: Device) -> None:
    """Wait for the device."""
    if device.is_gpu:
        torch.cuda.synchronize()

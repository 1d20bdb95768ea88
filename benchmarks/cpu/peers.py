"""Libraries of others that ours is measured against, each installed in a folder of its own.

They want other releases of what this environment has, so none is installed into it: a folder comes
in front of its packages only in the process that needs it. One that does not install leaves the
reason, which the tables then give.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cpu.machine import cpu_vendor

REASON = "not-installed.txt"
AUTO_ROUND = "auto-round"


@dataclass(frozen=True)
class Peer:
    """What pip is to install.

    Attributes:
        requirements: of the library, without what this environment has.
        environment: variables for building it.
        vendors: of the CPUs that it is made for, as /proc/cpuinfo names them; empty: of all.
    """

    requirements: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    vendors: tuple[str, ...] = ()


PEERS = {
    "llama.cpp": Peer(("llama-cpp-python==0.3.36", "diskcache", "jinja2", "gguf==0.19.0")),
    "ik_llama.cpp": Peer(("ik-llama-cpp-python==0.1.5", "gguf==0.19.0")),
    "zentorch": Peer(("zentorch==2.13.0.1", "deprecated", "wrapt"), vendors=("AuthenticAMD",)),
    "openvino": Peer(
        (
            "openvino-genai==2026.4.1.0",
            "openvino==2026.4.1",
            "openvino-tokenizers==2026.4.1.0",
            "gguf==0.19.0",
        )
    ),
    AUTO_ROUND: Peer(("auto-round-lib==0.16.0", "py-cpuinfo")),
}


def install(root: Path, names: tuple[str, ...] = ()) -> None:
    """Install the peers called `names`, by default all, below `root`; what is there stays."""
    for name in names or tuple(PEERS):
        folder = root / name
        if folder.is_dir() and not (folder / REASON).exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REASON).write_text("installing it was interrupted\n")
        print(f"installing {name}", flush=True)
        reason = _why_not(PEERS[name]) or _pip(PEERS[name], folder)
        if reason:
            (folder / REASON).write_text(f"{reason}\n")
            print(f"  not installed: {reason}", flush=True)
        else:
            (folder / REASON).unlink(missing_ok=True)


def refusal(root: Path | None, name: str) -> str | None:
    """Why a peer cannot be measured; None if it is installed."""
    if root is None or not (root / name).is_dir():
        return f"install it: python -m benchmarks.cpu peers --peers FOLDER --names {name}"
    reason = root / name / REASON
    return reason.read_text().strip() if reason.exists() else None


def _why_not(peer: Peer) -> str | None:
    vendor = cpu_vendor()
    if peer.vendors and vendor not in peer.vendors:
        return f"it is made for {' and '.join(peer.vendors)}, and this CPU is of {vendor}"
    return None


def _pip(peer: Peer, folder: Path) -> str | None:
    """Install into `folder`; the reason if that fails."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    done = subprocess.run(
        [*command, str(folder), *peer.requirements],
        env={**os.environ, **peer.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if line.lower().startswith("error")]
    return (errors or done.stderr.splitlines() or ["pip failed"])[-1][:300]

"""Times of `vllm serve`, from its command to its first token, once without caches and once with.

The operating system's cache holds the files each time: what is compared is what servers do.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.shapes import MODELS
from benchmarks.cpu.machine import process_group_bytes
from benchmarks.cpu.serve.child import use_all_cores

CONTEXT = 1024
CACHE_GIBIBYTES = "1"
PATIENCE = 900.0  # seconds that a server may take
STARTS = ("first", "second")
OPENMP = ("GOMP_CPU_AFFINITY", "OMP_NUM_THREADS")  # vLLM binds its workers' threads itself
CACHES = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR")


@dataclass(frozen=True)
class Server:
    """What is served, and how.

    Attributes:
        folder: `source` or `quantized`.
        dtype: vLLM's `--dtype`.
    """

    folder: str
    dtype: str


SERVERS = {
    "mergequant, float32": Server("quantized", "float32"),
    "16 bits, float32": Server("source", "float32"),
    "mergequant, bfloat16": Server("quantized", "bfloat16"),
    "16 bits, bfloat16": Server("source", "bfloat16"),
}


def run(options: argparse.Namespace, progress: Callable[[Sequence[Any]], None]) -> None:
    """Start each server twice; `progress` is called with all rows so far."""
    use_all_cores()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = _folders(options, Path(scratch))
        for name, server in SERVERS.items():
            own = Path(scratch) / name.replace(", ", "-").replace(" ", "-")  # it goes to a shell
            caches = {cache: str(own / cache.lower()) for cache in CACHES}
            for start in STARTS:
                log = Path(scratch) / f"{name} {start}.log"
                measured = measure(folders[server.folder], server.dtype, caches, log)
                rows.append({"name": name, "start": start, **measured})
                progress(rows)
                print(f"  {name}, {start} start: {measured}", flush=True)


def _folders(options: argparse.Namespace, scratch: Path) -> dict[str, Path]:
    if options.source and options.checkpoint:
        return {"source": options.source, "quantized": options.checkpoint}
    from benchmarks.cpu.start.folders import write_quantized, write_source

    if options.source or options.checkpoint:
        raise ValueError("--source and --checkpoint go together: a model, and what was made of it")
    model = MODELS[options.model]
    if model.model_type != "llama":
        raise ValueError(f"--model {model.name}: random folders are written of Llama's shape alone")
    return {
        "source": write_source(scratch / "source", model, CONTEXT),
        "quantized": write_quantized(scratch / "quantized", model, CONTEXT),
    }


def measure(folder: Path, dtype: str, caches: Mapping[str, str], log: Path) -> dict[str, float]:
    """Seconds until a server answers, until its first token, and its memory in bytes.

    Raises:
        RuntimeError: the server ended; with the end of its log.
    """
    begin = time.perf_counter()
    with serving(folder, dtype, caches, log) as (url, server):
        _wait(url, server, log)
        ready = time.perf_counter() - begin
        _complete(url, folder)
        first = time.perf_counter() - begin
        return {"ready": ready, "first_token": first, "resident": process_group_bytes(server.pid)}


@contextmanager
def serving(
    folder: Path, dtype: str, caches: Mapping[str, str], log: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A running `vllm serve`, its address and process; stopped with all that it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "vllm"),
        "serve",
        str(folder),
        "--dtype",
        dtype,
        "--port",
        str(port),
    ]
    command += ["--max-model-len", str(CONTEXT), "--max-num-seqs", "8", "--skip-tokenizer-init"]
    own = {"VLLM_CPU_KVCACHE_SPACE": CACHE_GIBIBYTES, "HF_HUB_OFFLINE": "1"}
    inherited = {name: value for name, value in os.environ.items() if name not in OPENMP}
    with log.open("wb") as out:
        server = subprocess.Popen(
            command,
            env={**inherited, **own, **caches},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        _stop(server)


def _stop(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(30)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    errors = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
    raise RuntimeError(f"the server did not start: {errors[:1] or 'no error in its log'}")


def _complete(url: str, folder: Path) -> None:
    """Ask for one token after a short prompt of token ids."""
    asked = {"model": str(folder), "prompt": list(range(5, 21)), "max_tokens": 1, "temperature": 0}
    asked |= {"detokenize": False, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        json.load(answer)

"""Child processes that print cells line by line, so that those before a crash are kept."""

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OnCell = Callable[[str, dict[str, Any]], None]


def run_child(
    module: str, arguments: Sequence[str], on_cell: OnCell, seconds: float, log: Path
) -> str | None:
    """Run `python -m MODULE ARGUMENTS`; hand every line `CELL key json` to `on_cell` as it
    comes and print every line `NOTE text`.

    Args:
        seconds: after which the child is killed.
        log: gets all that the child prints.

    Returns:
        None if the child ended well, else what happened, in a sentence.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1"}
    timed_out = threading.Event()
    last: deque[str] = deque(maxlen=40)
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w") as written,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        ) as child,
    ):

        def kill() -> None:
            timed_out.set()
            child.kill()

        timer = threading.Timer(max(seconds, 1.0), kill)
        timer.start()
        for line in child.stdout or ():
            written.write(line)
            if line.startswith("CELL "):
                _, key, record = line.split(" ", 2)
                on_cell(key, json.loads(record))
            else:
                last.append(line.strip())
                if line.startswith("NOTE "):
                    print(" ", line.removeprefix("NOTE "), end="", flush=True)
        timer.cancel()
        status = child.wait()
    if timed_out.is_set():
        return f"stopped after {seconds:.0f} s"
    if status == 0:
        return None
    return f"exit status {status}: {_cause(last)} (all of it in {log.name})"


def _python_path() -> str:
    """Put this checkout first, so that children import its benchmarks and plugin."""
    present = os.environ.get("PYTHONPATH")
    return str(ROOT) if not present else f"{ROOT}{os.pathsep}{present}"


def _cause(lines: Sequence[str]) -> str:
    """The last line that looks like an error."""
    for line in reversed(lines):
        if "Error" in line or "error:" in line.lower():
            return line[:300]
    return lines[-1][:300] if lines else "it printed nothing"

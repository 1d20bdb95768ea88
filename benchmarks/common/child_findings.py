"""Child processes that print findings line by line, so that what came before a death stays."""

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
Finding = Callable[[str, dict[str, Any]], None]


def run_child(
    module: str, arguments: Sequence[str], found: Finding, seconds: float, log: Path
) -> str | None:
    """Run `python -m MODULE ARGUMENTS`; hand every line `CELL key json` to `found` as it comes
    and print every line `NOTE text`.

    Args:
        seconds: after which the child is killed.
        log: gets all that the child prints.

    Returns:
        None if the child ended well, else what happened, in a sentence.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1"}
    late = threading.Event()
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
            late.set()
            child.kill()

        timer = threading.Timer(max(seconds, 1.0), kill)
        timer.start()
        for line in child.stdout or ():
            written.write(line)
            if line.startswith("CELL "):
                _, key, record = line.split(" ", 2)
                found(key, json.loads(record))
            else:
                last.append(line.strip())
                if line.startswith("NOTE "):
                    print(" ", line.removeprefix("NOTE "), end="", flush=True)
        timer.cancel()
        status = child.wait()
    if late.is_set():
        return f"stopped after {seconds:.0f} s"
    if status == 0:
        return None
    return f"exit status {status}: {_cause(last)} (all of it in {log.name})"


def _python_path() -> str:
    """This checkout first, so that children find the benchmarks and the plugin."""
    present = os.environ.get("PYTHONPATH")
    return str(ROOT) if not present else f"{ROOT}{os.pathsep}{present}"


def _cause(lines: Sequence[str]) -> str:
    """The last line that looks like an error."""
    for line in reversed(lines):
        if "Error" in line or "error:" in line.lower():
            return line[:300]
    return lines[-1][:300] if lines else "it printed nothing"

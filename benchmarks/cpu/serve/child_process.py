"""A child process that serves requests, so that several processes can take turns.

A request is a line of words on the child's input, a reply a line `REPLY json` on its output; all
else that it prints goes to a log.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MARK = "REPLY "


class DiedError(RuntimeError):
    """The child ended, or was ended because it took too long."""


class ChildProcess:
    """A child process that replies to requests.

    Args:
        module: run by `python -m`.
        environment: in place of this process's.
        log: gets all that the child prints.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.log_file = log.open("w")
        self.last_lines: deque[str] = deque(maxlen=40)
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, "PYTHONUNBUFFERED": "1"},
        )

    def request(self, words: str, seconds: float) -> dict[str, Any]:
        """Send a request and return its reply; DiedError says what happened to the child."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(words + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise DiedError(self._end()) from error
        return self.receive(seconds)

    def receive(self, seconds: float) -> dict[str, Any]:
        """Return the next reply without a request; the child is killed after `seconds`."""
        assert self.process.stdout is not None
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        try:
            for line in self.process.stdout:
                self.log_file.write(line)
                if line.startswith(MARK):
                    reply: dict[str, Any] = json.loads(line.removeprefix(MARK))
                    return reply
                self.last_lines.append(line.strip())
        finally:
            timer.cancel()
            self.log_file.flush()
        raise DiedError(self._end())

    def close(self) -> None:
        """End the child, which stops at the end of its input."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # what a dead child did not read
                self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log_file.close()

    def _end(self) -> str:
        status = self.process.wait()
        errors = [line for line in self.last_lines if "Error" in line or "error:" in line.lower()]
        cause = (errors or list(self.last_lines) or ["it printed nothing"])[-1][:300]
        return f"exit status {status}: {cause} (all of it in {self.log.name})"


def reply(content: Mapping[str, Any]) -> None:
    """Print one reply; called in the child."""
    print(f"{MARK}{json.dumps(content)}", flush=True)


def requests() -> Iterator[str]:
    """Requests in the order in which they reach the child, until its input ends."""
    return (line.strip() for line in sys.stdin)


def python_path(*folders: str | os.PathLike[str]) -> str:
    """Value of PYTHONPATH with `folders` in front."""
    present = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(part for part in (*map(str, folders), present) if part)

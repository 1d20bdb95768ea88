"""A child process that answers questions, so that several can be asked in turns.

A question is a line of words on the child's input, an answer a line `ANSWER json` on its output;
all else that it prints goes to a log.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MARK = "ANSWER "


class DiedError(RuntimeError):
    """The child ended, or was ended because it took too long."""


class Dialogue:
    """One child.

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
        self.written = log.open("w")
        self.last: deque[str] = deque(maxlen=40)
        self.child = subprocess.Popen(
            [sys.executable, "-u", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, "PYTHONUNBUFFERED": "1"},
        )

    def ask(self, question: str, seconds: float) -> dict[str, Any]:
        """Send `question`, wait for its answer; DiedError says what happened to the child."""
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(question + "\n")
            self.child.stdin.flush()
        except OSError as error:
            raise DiedError(self._end()) from error
        return self.listen(seconds)

    def listen(self, seconds: float) -> dict[str, Any]:
        """The next answer, without a question; the child is killed after `seconds`."""
        assert self.child.stdout is not None
        timer = threading.Timer(seconds, self.child.kill)
        timer.start()
        try:
            for line in self.child.stdout:
                self.written.write(line)
                if line.startswith(MARK):
                    answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
                    return answer
                self.last.append(line.strip())
        finally:
            timer.cancel()
            self.written.flush()
        raise DiedError(self._end())

    def close(self) -> None:
        """End the child, which stops at the end of its input."""
        if self.child.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # what a dead child did not read
                self.child.stdin.close()
        try:
            self.child.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.written.close()

    def _end(self) -> str:
        status = self.child.wait()
        said = [line for line in self.last if "Error" in line or "error:" in line.lower()]
        cause = (said or list(self.last) or ["it printed nothing"])[-1][:300]
        return f"exit status {status}: {cause} (all of it in {self.log.name})"


def answer(found: Mapping[str, Any]) -> None:
    """What a child calls."""
    print(f"{MARK}{json.dumps(found)}", flush=True)


def questions() -> "list[str] | Any":
    """The questions that come to a child, until there are no more."""
    return (line.strip() for line in sys.stdin)


def python_path(*folders: str | os.PathLike[str]) -> str:
    """PYTHONPATH with `folders` in front."""
    present = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(part for part in (*map(str, folders), present) if part)

"""vLLM's server for the demo: started, asked, timed and stopped."""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Of this very environment, whether or not it is activated.
VLLM = Path(sys.executable).parent / "vllm"
START_LIMIT = 900  # seconds: a large model on a slow disk
QUESTIONS = ("What is the capital of France?", "Write two sentences about the sea.")
BEGINNINGS = ('The "for" statement is used to',)  # for a model without a chat template
ANSWER_TOKENS = 80  # at most
TIMED_TOKENS = 64  # exactly, in each of the rounds
ROUNDS = 5


@dataclass(frozen=True)
class Served:
    """Answers of a server, one to each prompt, and its speed: tokens a second of one stream."""

    answers: list[str]
    speed: float


class NotServedError(Exception):
    """A server that did not start; the message ends with where its log is."""


def prompts(model: Path) -> tuple[str, ...]:
    """Return what the model of a folder is asked."""
    return QUESTIONS if has_chat_template(model) else BEGINNINGS


def has_chat_template(model: Path) -> bool:
    """Whether the tokenizer of a model's folder says how a conversation is written."""
    if (model / "chat_template.jinja").exists() or (model / "chat_template.json").exists():
        return True
    file = model / "tokenizer_config.json"
    return file.exists() and bool(json.loads(file.read_text()).get("chat_template"))


def on_a_gpu() -> bool:
    """Whether vLLM will serve on a GPU."""
    import torch

    return torch.cuda.is_available()


def dtype() -> str:
    """Return vLLM's --dtype for both models: the model's own, or float32 where that is faster.

    A CPU without instructions for bfloat16 takes many times as long in it as in float32.
    """
    if on_a_gpu():
        return "auto"
    from mergequant_vllm.kernels.slow_dtypes import SIXTEEN_BIT

    described = Path("/proc/cpuinfo")
    words = set(described.read_text().split()) if described.exists() else set()
    return "auto" if words & SIXTEEN_BIT else "float32"


def measure(model: Path, log: Path, wait: Callable[[], object], *flags: str) -> Served:
    """Serve a folder, ask it and time it once `wait` has returned; raises NotServedError."""
    with serving(model, log, *flags) as url:
        wait()
        chat = has_chat_template(model)
        answers = [(ask if chat else go_on)(url, prompt) for prompt in prompts(model)]
        return Served(answers, speed(url))


@contextmanager
def serving(model: Path, log: Path, *flags: str) -> Iterator[str]:
    """vLLM's server in its own process group, gone when this block is left, however it is left."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    flags = ("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo", *flags)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}  # GiB; vLLM would take half of all
    with log.open("w") as output:
        server = subprocess.Popen(
            [VLLM, "serve", model, "--max-model-len", "auto", *flags],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_healthy(server, url, log)
        yield url
    finally:
        stop(server)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait for the server; raises NotServedError if it ends or takes too long."""
    start = time.monotonic()
    while not healthy(url):
        waited = time.monotonic() - start
        if server.poll() is not None or waited > START_LIMIT:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            raise NotServedError(
                f"\n{tail}\n\nvLLM did not start; its log ends above, and is in {log}."
            )
        if sys.stdout.isatty():
            print(f"\rStarting vLLM: {waited:3.0f} s (log: {log})", end="", flush=True)
        time.sleep(0.5)
    print(f"\rvLLM started in {time.monotonic() - start:.0f} s (log: {log})", flush=True)


def healthy(url: str) -> bool:
    """Whether the server says that it is ready."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def stop(server: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to end, and after 20 seconds, or a second Ctrl-C, insist."""
    try:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=20)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # whoever outlived the server that started them
        server.wait()


def ask(url: str, question: str) -> str:
    """Return the answer to a question, always the likeliest token."""
    messages = [{"role": "user", "content": question}]
    body = {"messages": messages, "max_tokens": ANSWER_TOKENS, "temperature": 0}
    answer = post(f"{url}/v1/chat/completions", body)
    return str(answer["choices"][0]["message"]["content"]).strip()


def go_on(url: str, beginning: str) -> str:
    """Return how a text goes on, always the likeliest token."""
    body = {"prompt": beginning, "max_tokens": ANSWER_TOKENS, "temperature": 0}
    return str(post(f"{url}/v1/completions", body)["choices"][0]["text"]).strip()


def speed(url: str) -> float:
    """Return the tokens per second of one stream, the median of some rounds.

    vLLM's `ignore_eos` makes all answers equally long: speeds can be compared.
    """
    body = {"prompt": BEGINNINGS[0], "max_tokens": TIMED_TOKENS, "temperature": 0}
    seconds = []
    for _ in range(ROUNDS):
        start = time.monotonic()
        post(f"{url}/v1/completions", body | {"ignore_eos": True})
        seconds.append(time.monotonic() - start)
    return TIMED_TOKENS / statistics.median(seconds)


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the server's answer to a request for the model that it serves."""
    content = json.dumps({"model": "demo", **body}).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        answer: dict[str, Any] = json.load(response)
    return answer

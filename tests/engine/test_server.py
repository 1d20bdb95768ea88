"""Real HTTP: `vllm serve` with and without the flag, and a stock OpenAI client."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.engine.conftest import EXAMPLES, Reference, check_greedy

pytestmark = pytest.mark.engine

BIN = Path(sys.executable).parent
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
)
START_LIMIT = 400  # seconds


@contextmanager
def serving(log: Path, *command: str | Path) -> Iterator[OpenAI]:
    """Run a server command on a free port in its own process group; yields a client."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"],
            env={**os.environ, **path},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", log)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        for insist in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, insist)
                server.wait(60)


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")


def complete(client: OpenAI, prompt: str | list[int], **more: Any) -> Any:
    return client.completions.create(
        model="tiny", prompt=prompt, temperature=0.0, max_tokens=24, **more
    )


def test_serve_example_answers_completions_streams_and_32_requests_at_once(
    tmp_path: Path, served: Path, references: dict[int, Reference]
) -> None:
    flags = ("--dtype", "float32", "--enforce-eager")
    with serving(tmp_path / "log", EXAMPLES / "serve.sh", served, *flags) as client:
        ids = references[1].windows[0, :20].tolist()
        answer = complete(client, ids, extra_body={"return_token_ids": True, "ignore_eos": True})
        assert check_greedy(references[1], ids, answer.choices[0].token_ids) > 8
        text = complete(client, "The statement").choices[0].text
        assert len(text) > 10
        pieces = [part.choices[0].text for part in complete(client, "The statement", stream=True)]
        assert "".join(pieces) == text
        assert len(pieces) > 5
        prompts = [f"Object number {number} is" for number in range(32)]
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(lambda prompt: complete(client, prompt), prompts))
        assert all(answer.usage.completion_tokens > 0 for answer in answers)


def test_no_flag_is_needed_and_chat_works_in_16_bits_with_the_reference_kernel(
    tmp_path: Path, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEQUANT_KERNEL", "reference")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    template = tmp_path / "template.jinja"
    template.write_text(CHAT_TEMPLATE)
    flags = ("--chat-template", str(template), "--dtype", "bfloat16")
    log = tmp_path / "log"
    with serving(log, BIN / "vllm", "serve", served, *flags) as client:
        assert len(complete(client, "A function").choices[0].text) > 10
        messages: Any = [{"role": "user", "content": "What is a list?"}]
        request: dict[str, Any] = {"model": "tiny", "messages": messages, "temperature": 0.0}
        chat = client.chat.completions.create(**request, max_tokens=16)
        streamed = client.chat.completions.create(**request, max_tokens=16, stream=True)
        text = "".join(part.choices[0].delta.content or "" for part in streamed)
        assert text == chat.choices[0].message.content
        assert len(text) > 5
    assert "run on kernel 'reference', as MERGEQUANT_KERNEL asks" in log.read_text()


def test_batch_example_generates(served: Path) -> None:
    command = [sys.executable, EXAMPLES / "batch_generate.py", served, "The statement", "A list"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if " -> " in line]
    assert [line.partition(" -> ")[0] for line in lines] == ["'The statement'", "'A list'"]
    assert all(len(line.partition(" -> ")[2]) > 10 for line in lines)

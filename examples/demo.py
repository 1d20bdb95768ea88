"""The whole path: a model is quantized, measured before and after, served by vLLM and asked.

    python examples/demo.py [MODEL] [--calibration FILE] [--text FILE]

MODEL is a folder or a Hugging Face name; without it a tiny Llama is trained first, once.
Everything made is under .demo/ in the repository.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".demo"
# Of this very environment, whether or not it is activated.
MERGEQUANT = str(Path(sys.executable).parent / "mergequant")
VLLM = Path(sys.executable).parent / "vllm"
NEW_TOKENS = 128
START_LIMIT = 900  # seconds: a large model on a slow disk
PROMPT = 'The "for" statement is used to'


def tiny_model() -> Path:
    folder = CACHE / "tiny-llama"
    if not folder.exists():
        print("Training a tiny Llama on Python's documentation (once, a minute or two)", flush=True)
        subprocess.run([sys.executable, HERE / "train_tiny.py", folder], check=True)
    return folder


def local_folder(model: str) -> Path:
    """MODEL itself if it is a folder, else its files from the Hugging Face Hub."""
    from mergequant.errors import InputError
    from mergequant.model.reader import locate

    try:
        return locate(model).resolve()
    except InputError as error:
        sys.exit(f"demo: {error}")


def documentation() -> tuple[Path, Path]:
    """Text for a model that brings none: (calibration, held-out), written to two files."""
    from train_tiny import documentation as train_and_held_out

    files = CACHE / "train.txt", CACHE / "heldout.txt"
    for file, text in zip(files, train_and_held_out(), strict=True):
        file.write_text(text, encoding="utf-8")
    return files


def quantize(model: Path, name: str, calibration: Path) -> Path:
    output = CACHE / f"{name}-mergequant"
    if output.exists():
        shutil.rmtree(output)
    arguments = map(str, (model, output, "--calibration", calibration))
    # Without the training, which takes most of the time and gains a part of the loss: see README.
    subprocess.run([MERGEQUANT, "quantize", *arguments, "--fast"], check=True)
    return output


def perplexity(model: Path, text: Path) -> float:
    arguments = map(str, (model, "--text", text, "--engine", "transformers", "--json"))
    measured = subprocess.run(
        [MERGEQUANT, "perplexity", *arguments], check=True, stdout=subprocess.PIPE
    )
    return float(json.loads(measured.stdout)["perplexity"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(model: Path, *flags: str) -> Iterator[str]:
    """vLLM's server in its own process group, gone when this block is left, however it is left."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    flags = ("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo", *flags)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}  # GiB; vLLM would take half of all
    log = CACHE / "vllm.log"
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


def wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    start = time.monotonic()
    while not healthy(url):
        waited = time.monotonic() - start
        if server.poll() is not None or waited > START_LIMIT:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            sys.exit(f"\n{tail}\n\nvLLM did not start; its log ends above, and is in {log}.")
        if sys.stdout.isatty():
            print(f"\rStarting vLLM: {waited:3.0f} s (log: {log})", end="", flush=True)
        time.sleep(0.5)
    print(f"\rvLLM started in {time.monotonic() - start:.0f} s (log: {log})", flush=True)


def healthy(url: str) -> bool:
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


def complete(url: str, prompt: str, tokens: int) -> dict[str, Any]:
    """vLLM's `ignore_eos` makes the answer exactly `tokens` long: speeds can be compared."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    body |= {"temperature": 0.5, "top_p": 0.95, "seed": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        content: dict[str, Any] = json.load(answer)
    return content


def ask(url: str, prompt: str) -> tuple[str, float]:
    """(text, tokens per second) of one stream; the first request only warms up."""
    complete(url, prompt, 8)
    start = time.monotonic()
    answer = complete(url, prompt, NEW_TOKENS)
    seconds = time.monotonic() - start
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"] / seconds


def megabytes(model: Path) -> float:
    return sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e6


def show(sizes: list[float], perplexities: list[float], speed: float, text: str) -> None:
    print(f"\n{'':24}{'before':>12}{'after':>12}")
    print(f"{'size on disk, MB':24}{sizes[0]:12.1f}{sizes[1]:12.1f}")
    print(f"{'perplexity, held out':24}{perplexities[0]:12.2f}{perplexities[1]:12.2f}")
    print(f"{'tokens/s, one stream':24}{'':12}{speed:12.1f}")
    print(f"\n{PROMPT}{text}\n")


def demo(model: str | None, calibration: Path | None, text: Path | None) -> None:
    CACHE.mkdir(exist_ok=True)
    source = local_folder(model) if model else tiny_model()
    learned, held_out = documentation() if model else (source / "train.txt", source / "heldout.txt")
    name = model.rstrip("/").split("/")[-1] if model else source.name
    output = quantize(source, name, calibration or learned)
    both = [source, output]
    print("Measuring perplexity before and after", flush=True)
    perplexities = [perplexity(folder, text or held_out) for folder in both]
    with serving(output, "--quantization", "mergequant") as url:
        answer, speed = ask(url, PROMPT)
    show([megabytes(folder) for folder in both], perplexities, speed, answer)


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantize a model, measure it, serve it, ask it.")
    parser.add_argument(
        "model", nargs="?", help="folder or Hugging Face name (default: a tiny Llama)"
    )
    parser.add_argument("--calibration", type=Path, help="text to calibrate on")
    parser.add_argument("--text", type=Path, help="held-out text to measure perplexity on")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` stops the server
    try:
        demo(options.model, options.calibration, options.text)
    except subprocess.CalledProcessError as error:
        failed = " ".join(map(str, error.cmd))
        sys.exit(f"`{failed}` failed (exit status {error.returncode}); what it said is above.")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

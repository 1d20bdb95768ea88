"""The whole path: a model is quantized, and measured, served by vLLM and asked before and after.

    python examples/demo.py [MODEL] [--calibration FILE] [--text FILE]

MODEL is a folder or a Hugging Face name; without it SmolLM2-135M-Instruct is taken, see
`demo_model.py`. Everything made is under .demo/ in the repository.
"""

import argparse
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from demo_model import HERE, DemoModel, default_model, given_model
from demo_server import NotServedError, Served, dtype, measure, on_a_gpu, prompts

CACHE = HERE.parent / ".demo"
MERGEQUANT = str(Path(sys.executable).parent / "mergequant")  # of this very environment
SMALL = 1000.0  # MB of 16-bit weights, of which a few copies fit into any machine's memory


@dataclass(frozen=True)
class Figures:
    """What is compared, each (before, after); the first speed is None if it was not measured."""

    sizes: tuple[float, float]
    speeds: tuple[float | None, float]
    perplexities: tuple[float, float]


def quantize(model: DemoModel, calibration: Path) -> Path:
    """Quantize to a folder of its own, which is made anew."""
    output = CACHE / f"{model.name}-mergequant"
    if output.exists():
        shutil.rmtree(output)
    arguments = map(str, (model.folder, output, "--calibration", calibration))
    # Without the training, which takes most of the time and gains a part of the loss: see README.
    command = [MERGEQUANT, "quantize", *arguments, "--fast", *model.flags]
    subprocess.run(command, check=True)
    return output


class Perplexity:
    """A folder's perplexity on a text by the reference forward, in a process of its own."""

    def __init__(self, model: Path, text: Path) -> None:
        """Start the process."""
        arguments = map(str, (model, "--text", text, "--engine", "transformers", "--json"))
        self.command = [MERGEQUANT, "perplexity", *arguments]
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        self.said = ""

    def result(self) -> float:
        """Wait for the figure; raises CalledProcessError."""
        if self.process.returncode is None:
            self.said, _ = self.process.communicate()
        if self.process.returncode:
            raise subprocess.CalledProcessError(self.process.returncode, self.command)
        return float(json.loads(self.said)["perplexity"])

    def stop(self) -> None:
        """End the process, if it still runs."""
        self.process.kill()
        self.process.wait()


def megabytes(model: Path) -> float:
    """Return the size of a folder's weights on disk."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e6


def serve_both(
    before: Path, after: Path, number: str, wait: Callable[[], object]
) -> tuple[Served | None, Served]:
    """Serve one folder after the other; the first is None if it does not even start.

    A model that is too large to be served may fit once it is quantized. `wait` is called before
    anything is timed.
    """
    first: Served | None = None
    try:
        first = measure(before, CACHE / "vllm-before.log", wait, "--dtype", number)
    except NotServedError as error:
        print(f"{error}\nGoing on with the quantized model alone.", flush=True)
    flags = ("--dtype", number, "--quantization", "mergequant")
    return first, measure(after, CACHE / "vllm-after.log", wait, *flags)


def measure_both(
    before: Path, after: Path, text: Path, number: str
) -> tuple[tuple[float, float], tuple[Served | None, Served]]:
    """Return the perplexities and what was served, each of the 16-bit folder and the other.

    A server that starts keeps one core busy. While the first does, the perplexities of small models
    are taken on the others; those of large ones, and those on a GPU, before it, for the memory.
    """
    at_once = not on_a_gpu() and megabytes(before) < SMALL
    running: list[Perplexity] = []
    try:
        for folder in (before, after):
            running.append(Perplexity(folder, text))
            if not at_once:
                running[-1].result()
        served = serve_both(before, after, number, lambda: [x.result() for x in running])
        return (running[0].result(), running[1].result()), served
    finally:
        for measurement in running:
            measurement.stop()


def show_answers(asked: tuple[str, ...], before: Served | None, after: Served) -> None:
    """Print what both models answered to each prompt."""
    for number, prompt in enumerate(asked):
        print(f"\n{prompt}")
        if before:
            print(f"  before: {before.answers[number]}")
        print(f"  after:  {after.answers[number]}")


def table(figures: Figures) -> str:
    """Return the figures before and after as lines, with their ratios."""
    rows = (
        ("size on disk, MB", figures.sizes, ".1f"),
        ("tokens/s, one stream", figures.speeds, ".1f"),
        ("perplexity, held out", figures.perplexities, ".2f"),
    )
    lines = [f"{'':24}{'before':>12}{'after':>12}{'ratio':>10}"]
    for name, (before, after), form in rows:
        left = f"{before:12{form}}" if before else f"{'-':>12}"
        ratio = f"{after / before:10.2f}" if before else f"{'-':>10}"
        lines.append(f"{name:24}{left}{after:12{form}}{ratio}")
    return "\n".join(lines)


def verdict(figures: Figures) -> str:
    """Return in words what is better and what is worse, losses as plainly as gains."""
    said = ["smaller" if figures.sizes[1] < figures.sizes[0] else "LARGER"]
    if before := figures.speeds[0]:
        said.append("faster" if figures.speeds[1] > before else "SLOWER")
    nats = math.log(figures.perplexities[1] / figures.perplexities[0])
    quality = f"{'WORSE' if nats > 0 else 'better'} at predicting the text"
    return (
        f"The quantized model is {', '.join(said)} and {quality}: "
        f"its loss differs by {nats:+.3f} nats a token."
    )


def demo(chosen: str | None, calibration: Path | None, text: Path | None) -> None:
    """Run the whole path and print what came of it."""
    CACHE.mkdir(exist_ok=True)
    model = given_model(chosen, CACHE) if chosen else default_model(CACHE)
    both = model.folder, quantize(model, calibration or model.calibration)
    print("Measuring perplexity before and after, and starting vLLM", flush=True)
    number = dtype()
    perplexities, (before, after) = measure_both(*both, text or model.held_out, number)
    show_answers(prompts(model.folder), before, after)
    speeds = (before.speed if before else None, after.speed)
    figures = Figures((megabytes(both[0]), megabytes(both[1])), speeds, perplexities)
    print(f"\n{table(figures)}\n\n{verdict(figures)}")
    for remark in remarks(model, number, calibration, text):
        print(remark)


def remarks(
    model: DemoModel, number: str, calibration: Path | None, text: Path | None
) -> list[str]:
    """Return what a reader of the figures must know."""
    lines = [*model.remarks, f"Quantized with {' '.join(('--fast', *model.flags))}."]
    if calibration is None and text is None:
        lines.append(
            "Calibrated on nine tenths of the text of Python's `help()`, "
            "perplexity on the last tenth."
        )
    if number == "float32":
        lines.append("Both are served in float32: this CPU has no instructions for bfloat16.")
    return lines


def main() -> None:
    """Read the command line and run the demo."""
    parser = argparse.ArgumentParser(description="Quantize a model, measure it, serve it, ask it.")
    parser.add_argument(
        "model", nargs="?", help="folder or Hugging Face name (default: SmolLM2-135M-Instruct)"
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
    except NotServedError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

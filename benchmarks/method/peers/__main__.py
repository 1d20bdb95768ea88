"""What other quantizers cost the same pretrained model, beside `benchmarks.method.real`.

    python -m benchmarks.method.peers MODEL --calibration FILE [FILE ...] --text FILE [FILE ...]
        --environments FOLDER [--flatquant FOLDER] [--rows ROW [ROW ...]] [--work FOLDER]

Every quantizer is given the very calibration windows that `quantize` takes from the files, and its
loss is taken on the windows of `benchmarks.method.real`, in float32, through transformers and the
quantizer's own fake quantization. Each has a virtual environment of its own, a folder under
FOLDER, and FlatQuant an unchanged checkout besides (tried at its commit 9d88ffc):

    llm-compressor   pip install torch llmcompressor==0.14.0
    auto-round       pip install torch auto-round==0.16.1
    flatquant        pip install torch transformers==4.45.0 "accelerate<1" "numpy<2" scipy \\
                         termcolor datasets

Rows of `benchmarks/results/peers-MODEL.json` that the same command measured are not run again.
"""

import argparse
import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file

from benchmarks.method.model_rows import (
    FULL,
    add_arguments,
    command_of,
    full_loss,
    measure_all,
)
from benchmarks.method.peers.child import CALIBRATION, CONTROL_WINDOWS
from benchmarks.method.peers.rows import ROWS

ROOT = Path(__file__).parents[3]
SEED = 0  # the default of `quantize`


@dataclass(frozen=True)
class Row:
    """One quantizer's model.

    Attributes:
        name: key of `ROWS`.
        loss: nats a token, by text.
        control: loss on a few windows of the first text; with activations left exact, where the
            quantizer rounds them.
        windows: for calibration.
        seconds: to quantize.
        cpu_seconds: processor time of that, which other work on the machine changes less.
        peak_gib: the most memory of the process while it quantized, GiB.
        versions: in the quantizer's environment.
    """

    name: str
    loss: dict[str, float]
    control: dict[str, float]
    windows: int
    seconds: float
    cpu_seconds: float
    peak_gib: float
    versions: dict[str, str]
    excess: dict[str, float] = field(default_factory=dict)

    @property
    def columns(self) -> set[str]:
        """Texts that it was measured on."""
        return set(self.loss)


def write_tokens(file: Path, given: argparse.Namespace) -> None:
    """Write the windows of calibration and of each text, the same for every row."""
    from mergequant.calibration.sources import calibration_sources
    from mergequant.calibration.text import calibration_windows
    from mergequant.calibration.tokenizer import load_tokenizer
    from mergequant.evaluate.perplexity import text_windows

    tokenizer = load_tokenizer(given.model)
    sources = calibration_sources(given.calibration)
    size = {"samples": given.samples, "length": given.sequence}
    tensors = {
        text.stem: text_windows(text, tokenizer, given.length, given.windows).clone()
        for text in given.text
    }
    tensors[CALIBRATION] = calibration_windows(sources, tokenizer, **size, seed=SEED)
    save_file(tensors, file)


def measure(name: str, given: argparse.Namespace, tokens: Path) -> Row:
    """Quantize and evaluate one row in its environment."""
    peer = ROWS[name]
    windows = peer.windows or given.samples
    request = {
        "model": str(given.model.resolve()),
        "tokens": str(tokens.resolve()),
        "texts": [text.stem for text in given.text],
        "windows": windows,
        "options": {**peer.options, "checkout": str(given.flatquant)},
        "distributions": peer.distributions,
    }
    file = given.work / "request.json"
    file.write_text(json.dumps(request))
    python = (given.environments / peer.environment / "bin" / "python").absolute()
    command = [str(python), "-m", f"benchmarks.method.peers.{peer.module}", str(file.resolve())]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=given.work, env=variables, check=True, stdout=subprocess.PIPE, text=True
    )
    return Row(name, windows=windows, **json.loads(done.stdout.splitlines()[-1]))


def table(rows: list[Row]) -> str:
    """Table in Markdown."""
    texts = list(rows[0].loss)
    head = " | ".join(f"{text}: excess" for text in texts)
    lines = [
        f"| | {head} | weights | activations | windows | CPU seconds | seconds | peak, GiB |",
        "|---" + "|---:" * len(texts) + "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        peer = ROWS[row.name]
        cells = [f"{row.excess[text]:+.4f}" if text in row.excess else "-" for text in texts]
        cost = "- | - | - | -"
        if row.name != FULL:
            cost = f"{row.windows} | {row.cpu_seconds:.0f} | {row.seconds:.0f} | {row.peak_gib:.1f}"
        cells += [peer.weights, peer.activations, cost]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", full_loss(rows), *notes(rows)])


def notes(rows: list[Row]) -> list[str]:
    """What each environment holds, and that activations were rounded where they should be."""
    environments = {}
    for row in rows:
        named = ", ".join(f"{name} {version}" for name, version in row.versions.items())
        environments[ROWS[row.name].environment] = named
    lines = [f"- {name}: {named}" for name, named in environments.items()]
    lines += [
        "",
        f"Loss on the first {CONTROL_WINDOWS} windows, and with activations left exact:",
        "",
    ]
    for row in rows:
        few = ", ".join(f"{loss:.4f}" for loss in row.control.values())
        lines.append(f"- {row.name}: {few}")
    return ["", "Environments:", "", *lines]


def parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(description="What other quantizers cost a pretrained model.")
    add_arguments(parser, list(ROWS), samples="windows for calibration")
    parser.add_argument("--environments", type=Path, required=True, help="virtual environments")
    parser.add_argument("--flatquant", type=Path, help="checkout of FlatQuant")
    parser.add_argument("--work", type=Path, default=Path("peers-work"), help="for token windows")
    return parser


def command(given: argparse.Namespace) -> str:
    """What measures the same, written beside the figures."""
    return command_of("benchmarks.method.peers", given)


def main() -> None:
    """Measure the rows that are not known yet, and write the record after each."""
    given = parser().parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    tokens = given.work / "tokens.safetensors"
    write_tokens(tokens, given)
    name = f"peers-{given.model.resolve().name}"
    rows = (given.rows, {text.stem for text in given.text}, ROWS, Row)
    measure_all(name, command(given), *rows, lambda x: measure(x, given, tokens), table)


if __name__ == "__main__":
    main()

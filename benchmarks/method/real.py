"""What quantizing costs a pretrained model, served by vLLM: the yardstick of the defaults.

    python -m benchmarks.method.real MODEL --calibration FILE [FILE ...] --text FILE [FILE ...]
        [--items FILE [FILE ...]] [--rows ROW [ROW ...]] [--work FOLDER]

Each row is quantized and served in a process of its own, and its loss is taken on the first windows
of each text, its zero-shot accuracy on the first items (lm-eval: the extra `tasks`). Rows of
`benchmarks/results/real-MODEL.json` that the same command measured, on these texts or others, are
not run again, and `quantize` continues where it was stopped, so that an interrupted run goes on.
All that the rows do not name is the default; "plain" is `--fast --reconstruction none`.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.method import zero_shot
from benchmarks.method.model_rows import (
    FULL,
    add_arguments,
    command_of,
    full_loss,
    measure_all,
    names,
)
from mergequant.cli_flags import BEST

# Of windows for GPTQ, `quantize` takes by default half of those that training takes.
FAST: Mapping[str, Any] = {"compensation_rank": 0, "gptq_samples": None}
PLAIN: Mapping[str, Any] = {**FAST, "reconstruction": "none"}
EIGHT: Mapping[str, Any] = {"static_bits": 8, "dynamic_bits": 8}
CARRIED: Mapping[str, Any] = {"activations": "fully_static", "static_bits": 8}
# What each row changes of the defaults; those of `PLAIN` tell the steps apart.
ROWS: dict[str, Mapping[str, Any] | None] = {
    FULL: None,
    "W4A4 --fast": FAST,
    "W4A4": {},
    "W4A4 --fast --average-bits 5": {**FAST, "average_bits": 5.0},
    "W4A4 --best": BEST,
    "W4A4 --fast --no-equalization": {**FAST, "equalization": False},
    "W4A4 --fast --no-equalization --residual-rotation full": {
        **FAST,
        "equalization": False,
        "residual_rotation": "full",
    },
    "W4A8 --fast": {**FAST, **EIGHT},
    "W4A8": EIGHT,
    "W8A8 --fast": {**FAST, **EIGHT, "weight_bits": 8},
    "W8A8 --fast --activations fully_static": {**FAST, **CARRIED, "weight_bits": 8},
    "W6A6 --fast": {**FAST, "static_bits": 6, "dynamic_bits": 6, "weight_bits": 6},
    "W4A8 --fast --activations fully_static": {**FAST, **CARRIED},
    "W4A4 --fast --activations fully_static": {**FAST, **CARRIED, "static_bits": 4},
    "W4A4 --fast --activations fully_static, o and down in 8 bits": {
        **FAST,
        "activations": "fully_static",
        "overrides": {"re:.*(o|down)_proj": {"static_bits": 8}},
    },
    "W4A4 --fast --dynamic-bits 8": {**FAST, "dynamic_bits": 8},
    "W4A4 plain": PLAIN,
    "W4A4 plain --rotation none": {**PLAIN, "rotation": "none"},
    "W4A4 plain --no-static-zero-points": {**PLAIN, "static_zero_points": False},
    "W4A4 plain --no-input-correction": {**PLAIN, "input_correction": False},
    "W4A4 plain --dynamic-zero-points": {**PLAIN, "dynamic_zero_points": True},
    "W4A4 plain --mix-heads 9": {**PLAIN, "mix_heads": 9},
    "W4A4 plain --group-size 64": {**PLAIN, "group_size": 64},
    "W4A4 plain --rotation none --segments 4": {**PLAIN, "rotation": "none", "segments": 4},
}


@dataclass(frozen=True)
class Row:
    """One quantized model.

    Attributes:
        name: key of `ROWS`.
        loss: nats a token, by text.
        seconds: to quantize.
        peak_gib: the most memory of the process that quantized, GiB.
        bytes: of the checkpoint's tensors.
        rotation: what was chosen.
        accuracy: percent of items answered right and its standard error, by file.
    """

    name: str
    loss: dict[str, float]
    seconds: float = 0.0
    peak_gib: float = 0.0
    bytes: int = 0
    rotation: str = ""
    accuracy: dict[str, tuple[float, float]] = field(default_factory=dict)
    excess: dict[str, float] = field(default_factory=dict)

    @property
    def columns(self) -> set[str]:
        """Texts and files of items that it was measured on."""
        return {*self.loss, *self.accuracy}


def quantize_row(model: Path, folder: Path, changes: str, calibration: list[Path]) -> None:
    """Quantize in this process; prints seconds and peak memory as JSON."""
    from mergequant import Options, quantize

    began = time.monotonic()
    quantize(model, folder, calibration, Options.model_validate_json(changes), progress=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": time.monotonic() - began, "peak_gib": peak}))


def serve_row(folder: Path, texts: list[Path], length: int, windows: int) -> None:
    """Serve in this process and print the loss on each text as JSON."""
    from mergequant.calibration.tokenizer import load_tokenizer
    from mergequant.evaluate.perplexity import prompt_logprobs, text_windows, vllm_engine

    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": length + 1}
    tokenizer = load_tokenizer(folder)
    with vllm_engine(folder, tensor_parallel_size=1, **arguments) as llm:
        losses = {
            text.stem: -float(
                prompt_logprobs(llm, text_windows(text, tokenizer, length, windows)).mean()
            )
            for text in texts
        }
    print(json.dumps(losses))


def child(*arguments: object) -> dict[str, Any]:
    """What this file prints last as JSON when it is called with `arguments`."""
    command = [sys.executable, "-m", "benchmarks.method.real", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measure(name: str, given: argparse.Namespace, model: Path) -> Row:
    """Quantize and serve one row; the checkpoint is removed afterwards."""
    changes, folder = ROWS[name], model
    made: dict[str, Any] = {}
    if changes is not None:
        folder = given.work / name.replace(" ", "_")
        options = {
            "statistics_samples": given.statistics,
            "gptq_samples": given.samples,
            "compensation_samples": given.samples,
            "sequence_length": given.sequence,
            "head_bits": 16,  # what the rows tell apart is in the blocks
            **changes,
        }
        texts = [str(file) for file in given.calibration]
        note = folder.with_name(f"{folder.name}.json")  # a run that ended while it served goes on
        if not note.exists():
            made = child("--child", "quantize", model, folder, json.dumps(options), *texts)
            note.write_text(json.dumps({"options": options, **made}))
        made = json.loads(note.read_text())
        if made.pop("options") != options:
            raise SystemExit(f"{folder} was made with other options: remove it and {note}.")
    limits = (given.length, given.windows)
    loss = child("--child", "serve", folder, *limits, *given.text)
    if given.items:
        made["accuracy"] = zero_shot.accuracies(folder, given.items, given.limit, given.length)
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if folder != model:
        shutil.rmtree(folder)
        folder.with_name(f"{folder.name}.json").unlink()
    rotation = config.get("provenance", {}).get("options", {}).get("rotation", "")
    return Row(name, loss, bytes=size, rotation=rotation, **made)


def table(rows: list[Row]) -> str:
    """Table in Markdown."""
    texts, items = list(rows[0].loss), list(rows[0].accuracy)
    heads = [f"{text}: excess" for text in texts] + [
        f"{file}: {zero_shot.METRIC}" for file in items
    ]
    lines = [f"| | {' | '.join(heads)} | rotation | seconds | peak, GiB | MB |"]
    lines.append("|---" + "|---:" * len(heads) + "|---|---:|---:|---:|")
    for row in rows:
        cells = [f"{row.excess[text]:+.4f}" if text in row.excess else "-" for text in texts]
        cells += [
            "{:.1f} ± {:.1f}".format(*row.accuracy[file]) if file in row.accuracy else "-"
            for file in items
        ]
        lines.append(
            f"| {row.name} | {' | '.join(cells)} | {row.rotation or '-'} | "
            f"{_or_dash(row.seconds, 0)} | {_or_dash(row.peak_gib, 1)} | {row.bytes / 1e6:.0f} |"
        )
    return "\n".join([*lines, "", full_loss(rows)])


def _or_dash(value: float, digits: int) -> str:
    """Write a number, or a dash for one that was not measured."""
    return f"{value:.{digits}f}" if value else "-"


def parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(description="What quantizing costs a pretrained model.")
    add_arguments(parser, list(ROWS), samples="windows for GPTQ and training")
    parser.add_argument("--work", type=Path, default=Path("real-work"), help="for checkpoints")
    parser.add_argument("--statistics", type=int, default=32, help="windows for steps")
    parser.add_argument("--items", type=Path, nargs="+", default=[], help="zero-shot: JSON lines")
    parser.add_argument("--limit", type=int, default=500, help="items of each file")
    return parser


def command(given: argparse.Namespace) -> str:
    """What measures the same, written beside the figures."""
    tasks = f" --items {names(given.items)}" if given.items else ""
    return command_of("benchmarks.method.real", given, "statistics", "limit") + tasks


def main() -> None:
    if sys.argv[1:3] == ["--child", "quantize"]:
        model, folder, changes, *texts = sys.argv[3:]
        quantize_row(Path(model), Path(folder), changes, [Path(text) for text in texts])
        return
    if sys.argv[1:3] == ["--child", "serve"]:
        folder, length, windows, *texts = sys.argv[3:]
        serve_row(Path(folder), [Path(text) for text in texts], int(length), int(windows))
        return
    given = parser().parse_args()
    model = given.model.resolve()
    columns = {file.stem for file in [*given.text, *given.items]}
    rows = (given.rows, columns, ROWS, Row)
    measure_all(
        f"real-{model.name}", command(given), *rows, lambda x: measure(x, given, model), table
    )


if __name__ == "__main__":
    main()

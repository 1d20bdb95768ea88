"""Loss of quantized models served by vLLM, with and without structured outliers.

    python -m benchmarks.method.accuracy MODEL [MODEL ...] --text FILE [--windows N] [--engine vllm]

The text's first half calibrates and its second half is evaluated; stories separated by
`<|endoftext|>` stay whole. Each model is measured as it is and with outliers put in by a rescaling
that does not change its function (tests/outliers.py): full precision, step migration, and the
same command's round-to-nearest per-token baseline (`--activations dynamic`). Writes
`benchmarks/results/accuracy.json` and `.md`.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common.record import environment, save
from mergequant import Options, perplexity, quantize
from mergequant.evaluate.perplexity import Engine
from tests.outliers import with_outliers

SEPARATOR = "<|endoftext|>"
RTN = Options(
    activations="dynamic",
    rotation="none",
    equalization=False,
    weights="rtn",
    clipping="none",
    weight_search="minmax",
    reconstruction="none",
    compensation_rank=0,
    head_bits=16,
)
VARIANTS: tuple[tuple[str, Options | None], ...] = (
    ("full precision", None),
    ("dynamic per token, round to nearest", RTN),
    ("static, without compensation (--fast)", Options(compensation_rank=0, head_bits=16)),
    ("static, the whole method (default)", Options(head_bits=16)),
)


@dataclass(frozen=True)
class Row:
    """`excess`: loss above full precision on the same tokens, nats; `seconds`: to quantize."""

    model: str
    outliers: bool
    variant: str
    loss: float
    excess: float
    tokens: int
    seconds: float


def halves(text: Path, folder: Path) -> tuple[Path, Path]:
    """Calibration and evaluation text, as JSON lines."""
    documents = [x.strip() for x in text.read_text().split(SEPARATOR) if x.strip()]
    middle = len(documents) // 2
    files = folder / "calibration.jsonl", folder / "evaluation.jsonl"
    for file, part in zip(files, (documents[:middle], documents[middle:]), strict=True):
        file.write_text("".join(json.dumps({"text": x}) + "\n" for x in part))
    return files


def measure(model: Path, text: Path, windows: int, engine: Engine) -> Iterator[Row]:
    """All rows of one model."""
    with tempfile.TemporaryDirectory() as scratch:
        calibration, evaluation = halves(text, Path(scratch))
        for outliers in (False, True):
            source = model
            if outliers:
                source = with_outliers(model, Path(scratch) / f"{model.name}-outliers")
            full = 0.0
            for number, (variant, options) in enumerate(VARIANTS):
                folder, began = source, time.monotonic()
                if options is not None:
                    output = Path(scratch) / f"{outliers}-{number}"
                    folder = quantize(source, output, [calibration], options, progress=False)
                seconds = time.monotonic() - began
                result = perplexity(
                    folder, evaluation, engine=engine, most_windows=windows, progress=False
                )
                full = result.loss if options is None else full
                excess = result.loss - full
                row = Row(
                    model.name, outliers, variant, result.loss, excess, result.tokens, seconds
                )
                print(
                    f"{row.model:<14} {row.outliers!s:<6} {variant:<48} {row.loss:.4f}", flush=True
                )
                yield row


def table(rows: list[Row]) -> str:
    """Markdown: one line a variant, excess loss plain and with outliers."""
    lines = ["| model | variant | loss | excess | excess with outliers | seconds |"]
    lines.append("|---|---|---|---|---|---|")
    plain = {(row.model, row.variant): row for row in rows if not row.outliers}
    spiked = {(row.model, row.variant): row for row in rows if row.outliers}
    for key, row in plain.items():
        lines.append(
            f"| {row.model} | {row.variant} | {row.loss:.4f} | {row.excess:+.4f} | "
            f"{spiked[key].excess:+.4f} | {row.seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss of quantized models, served.")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    options = parser.parse_args()
    rows = [
        row
        for model in options.models
        for row in measure(model.resolve(), options.text, options.windows, options.engine)
    ]
    names = " ".join(model.name for model in options.models)
    command = (
        f"python -m benchmarks.method.accuracy {names} --text {options.text.name} "
        f"--windows {options.windows} --engine {options.engine}"
    )
    save("accuracy", command, [asdict(row) for row in rows], table(rows), environment())
    print(table(rows))


if __name__ == "__main__":
    main()

"""Loss against the threshold of reconstruction: pruning, padding, staggered rounding.

    python -m benchmarks.method.reconstruction MODEL --calibration FILE [FILE ...] --text FILE

Every row is quantized without compensation and measured in the reference forward; K may grow to
twice its length, so that each threshold can have all the copies that it asks for. Writes
`benchmarks/results/reconstruction.json`, `.md` and `.png`.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.record import RESULTS, environment, save
from benchmarks.method.yardstick import Yardstick
from mergequant import Options

PLAIN = Options(
    rotation="none",
    static_zero_points=False,
    input_correction=False,
    reconstruction="none",
    compensation_rank=0,
    weight_search="minmax",
    head_bits=16,
)
ALPHAS = {"prune": (5.0, 3.0, 2.0, 1.0), "pad": (5.0, 2.0, 1.0, 0.5, 0.0)}


@dataclass(frozen=True)
class Row:
    """`copies`: M, mean over the norms; `growth`: of K; `excess`: loss above full precision."""

    mode: str
    split_by: str
    staggered: bool
    alpha: float
    copies: float
    growth: float
    excess: float


def variants() -> list[dict[str, Any]]:
    """Options of each row, the plain one first."""
    rows: list[dict[str, Any]] = [{"reconstruction": "none", "alpha": 0.0}]
    for mode, alphas in ALPHAS.items():
        for split_by, staggered in (("step", False), ("folded", True)):
            for alpha in alphas:
                shape = {"reconstruction": mode, "alpha": alpha, "max_extra_channels": 1.0}
                rows.append({**shape, "split_by": split_by, "staggered": staggered})
    return rows


def measure(
    model: Path, calibration: list[Path], text: Path, base: Options, most: int
) -> list[Row]:
    """All rows of one model."""
    yardstick = Yardstick(model, text, base.sequence_length, most)
    print(f"full precision {yardstick.full_precision:.4f}", flush=True)
    rows = []
    for changes in variants():
        options = Options.model_validate({**base.model_dump(), **changes})
        quantized = yardstick.quantize(calibration, options)
        shapes = [line["reconstruction"] for line in quantized.report if line.get("reconstruction")]
        row = Row(
            mode=options.reconstruction,
            split_by=options.split_by,
            staggered=options.staggered and options.reconstruction != "none",
            alpha=float(options.alpha),
            copies=sum(x["copies"] for x in shapes) / max(1, len(shapes)),
            growth=max((x["growth"] for x in shapes), default=0.0),
            excess=yardstick.excess(quantized.model),
        )
        print(row, flush=True)
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """Table in Markdown."""
    lines = [
        "| mode | split by | staggered | alpha | copies M | K grows by | excess loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        staggered = "yes" if row.staggered else "no"
        lines.append(
            f"| {row.mode} | {row.split_by} | {staggered} | {row.alpha:g} | {row.copies:.1f} | "
            f"{row.growth:.1%} | {row.excess:+.4f} |"
        )
    return "\n".join(lines)


def plot(rows: list[Row], file: Path) -> None:
    """Excess loss against the threshold, and against the copies it makes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    lines: dict[str, list[Row]] = {}
    for row in rows[1:]:
        label = f"{row.mode}, by {row.split_by}" + (", staggered" if row.staggered else "")
        lines.setdefault(label, []).append(row)
    for label, points in lines.items():
        axes[0].plot([x.alpha for x in points], [x.excess for x in points], "o-", label=label)
        axes[1].plot([x.copies for x in points], [x.excess for x in points], "o-", label=label)
    for axis, name in zip(axes, ("threshold alpha", "copies M, mean over the norms"), strict=True):
        axis.axhline(rows[0].excess, color="grey", linestyle="--", label="no reconstruction")
        axis.set_xlabel(name)
    axes[0].set_ylabel("loss above full precision, nats a token")
    axes[0].set_yscale("log")
    axes[1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss against the threshold of reconstruction.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--samples", type=int, default=64, help="windows for GPTQ")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    given = parser.parse_args()
    base = PLAIN.model_copy(
        update={
            "gptq_samples": given.samples,
            "statistics_samples": 16,
            "sequence_length": given.length,
        }
    )
    rows = measure(given.model.resolve(), given.calibration, given.text, base, given.windows)
    texts = " ".join(file.name for file in given.calibration)
    command = (
        f"python -m benchmarks.method.reconstruction {given.model.name} --calibration {texts} "
        f"--text {given.text.name} --windows {given.windows} --samples {given.samples} "
        f"--length {given.length}"
    )
    save("reconstruction", command, [asdict(row) for row in rows], table(rows), environment())
    plot(rows, RESULTS / "reconstruction.png")
    print(table(rows))


if __name__ == "__main__":
    main()

"""Peak memory of the quantizer beside what its formula says, and the factors that it would need.

    python -m benchmarks.method.memory             # measures every case, about 6 minutes
    python -m benchmarks.method.memory --recount   # the same peaks, with the formula as it is now
    python -m benchmarks.method.memory --estimate  # what the formula says of Llama-3

Each case is a process of its own. Its anonymous memory (RssAnon of /proc/self/status) is sampled
every 2 ms; pages that belong to mapped files are left out, since the kernel drops them at will.
What a model of 128 channels takes, quantized before, counts as the libraries' own. glibc is told to
map each tensor of 512 KiB or more by itself, as it does by default above 32 MiB: below, it keeps
freed memory in a heap, and the peak of a model as small as these is half slack that a real one has
not.

A factor is what a peak holds beyond the terms that are counted, over the bytes that the factor
multiplies; 0 where a batch of tokens alone is counted for more. `FACTOR` and `TRAINED_FACTOR` are
the largest of their columns, rounded up.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.record import RESULTS, environment, save
from mergequant import Options
from mergequant.model.architectures import find
from mergequant.quantizer.memory.needed import (
    FACTOR,
    LIBRARIES,
    TRAINED_FACTOR,
    MemoryNeed,
    Terms,
    needed_memory,
)
from mergequant.quantizer.resolve import samples_of
from tests.tiny import make_model, write_text

MIB, GIB = 2**20, 2**30
COMMAND = "python -m benchmarks.method.memory"
FAST: dict[str, Any] = {
    "rotation": "none",
    "statistics_samples": 4,
    "gptq_samples": 8,
    "sequence_length": 128,
    "reconstruction": "pad",  # `auto` tries it among others
    "alpha": 1.0,
    "clip_points": 3,
    "gptq_block": 32,
    "weight_search": "minmax",  # the search by error takes half the time and works on slices
    "compensation_rank": 0,
    "device": "cpu",
}
TRAINED = {"compensation_rank": 64, "compensation_samples": 8, "compensation_epochs": 1}
GROUPS = {"group_size": 32, "asymmetric": True}
METHODS: dict[str, dict[str, Any]] = {
    "--fast": {},
    "--fast, long windows": {"sequence_length": 1024},
    "--fast, rotation online": {"rotation": "online"},
    "--fast, groups with zero points": GROUPS,
    "default": TRAINED,
    "default, short windows": {**TRAINED, "sequence_length": 32},
    "groups with zero points": {**GROUPS, **TRAINED},
    "groups with zero points, short windows": {**GROUPS, **TRAINED, "sequence_length": 32},
}
WIDE, SQUARE, NARROW = (512, 3, 2), (512, 1, 2), (256, 3, 2)  # channels, MLP's over them, blocks
CASES: list[tuple[str, tuple[int, int, int]]] = [
    *((name, WIDE) for name in METHODS),
    *((name, SQUARE) for name in ("--fast", "default")),
    *((name, NARROW) for name in ("--fast", "default")),
    ("--fast", (512, 3, 6)),
]
LLAMA_3: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "Llama-3-70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
}


class Peak(threading.Thread):
    """Samples the anonymous memory of this process until stopped: bytes, by what `phase` is."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.phase = "quantizing"
        self.bytes = {"quantizing": 0, "training": 0}
        self.running = True

    def run(self) -> None:
        while self.running:
            phase = self.phase
            self.bytes[phase] = max(self.bytes[phase], anonymous_bytes())
            time.sleep(0.002)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux")


def peaks_of(model: str, output: str, text: str, method: str) -> dict[str, int]:
    """Bytes of one run of `quantize`, before and while it trains the compensation."""
    import mergequant.quantizer.block as block
    import mergequant.quantizer.run

    compensate = block.compensate
    peak = Peak()

    def compensate_and_tell(*arguments: Any) -> Any:
        peak.phase = "training"
        try:
            return compensate(*arguments)
        finally:
            peak.phase = "quantizing"

    block.compensate = compensate_and_tell
    peak.start()
    options = Options.model_validate_json(method)
    mergequant.quantizer.run.quantize(model, output, [text], options, progress=False)
    peak.running = False
    peak.join()
    block.compensate = compensate
    return peak.bytes


def quantize_and_watch(smallest: str, *case: str) -> None:
    """Child process: print bytes of the libraries, and the peaks of `case` beyond them."""
    torch.set_num_threads(1)
    _, output, text, method = case
    imports = anonymous_bytes()
    few = {"statistics_samples": 1, "gptq_samples": 2, "sequence_length": 16}
    fields = {**json.loads(method), **few}
    peaks_of(smallest, f"{output}-smallest", text, json.dumps(fields))
    baseline = anonymous_bytes()
    peaks = {phase: max(0, x - baseline) for phase, x in peaks_of(*case).items()}
    print(json.dumps({"libraries": baseline - imports, **peaks}))


def measure(name: str, shape: tuple[int, int, int], scratch: Path) -> dict[str, Any]:
    """Bytes of one case: peaks and model."""
    method = {**FAST, **METHODS[name]}
    hidden, mlp, blocks = shape
    smallest = tiny_model(scratch / "smallest", 128, 1, 1)
    model = tiny_model(scratch / f"model-{hidden}-{mlp}-{blocks}", *shape)
    # A line is about 90 tokens. More of them than are needed would be a peak of the tokenizer's.
    lines = method["gptq_samples"] * method["sequence_length"] // 80
    text = write_text(scratch / "text.txt", repeats=lines + 10)
    command = [sys.executable, "-m", "benchmarks.method.memory", "--child", str(smallest)]
    command += [str(model), tempfile.mkdtemp(dir=scratch) + "/out", str(text), json.dumps(method)]
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB // 2)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environ)
    peaks: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return {
        "method": name,
        "hidden": hidden,
        "mlp": mlp,
        "blocks": blocks,
        "model": (model / "model.safetensors").stat().st_size,
        **peaks,
    }


def tiny_model(folder: Path, hidden: int, mlp: int, blocks: int) -> Path:
    if folder.exists():
        return folder
    return make_model(
        folder,
        blocks=blocks,
        hidden=hidden,
        intermediate=mlp * hidden,
        heads=hidden // 32,
        kv_heads=hidden // 64,
        context=2048,
        dtype=torch.bfloat16,
    )


def counted(row: dict[str, Any]) -> dict[str, Any]:
    """A measured row with what the formula predicts for it, and the factors that it needs."""
    options = Options(**{**FAST, **METHODS[row["method"]]})
    hidden = row["hidden"]
    config = {
        "vocab_size": 258,
        "hidden_size": hidden,
        "intermediate_size": row["mlp"] * hidden,
        "num_hidden_layers": row["blocks"],
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "dtype": "bfloat16",
    }
    windows = max(options.statistics_samples, options.gptq_samples)
    run = find("llama"), config, options, windows, options.sequence_length
    need, terms = needed_memory(*run), Terms(*run)
    stays = terms.hidden() + terms.block() + terms.inputs() + terms.stored()
    over = row["quantizing"] - stays
    # Either the work on matrices is as much as was measured, or half of it with a batch is.
    halved = 2 * (over - terms.batch())
    factors = {"factor": max(0, min(over, halved)) / terms.matrix()}
    if options.compensated:
        over = row["training"] - stays - terms.training_batch()
        factors["trained_factor"] = max(0, over) / terms.trainable()
    return {**row, "predicted": need.together - LIBRARIES, **factors}


def table(rows: list[dict[str, Any]]) -> str:
    """Table in Markdown."""
    lines = [
        "| method | hidden | MLP | blocks | quantizing, MiB | training, MiB | predicted, MiB "
        "| predicted / measured | factor | factor of training |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        measured = max(row["quantizing"], row["training"])
        cells = [row["method"], row["hidden"], row["mlp"] * row["hidden"], row["blocks"]]
        cells += [f"{row[x] / MIB:.0f}" if row[x] else "" for x in ("quantizing", "training")]
        cells += [f"{row['predicted'] / MIB:.0f}", f"{row['predicted'] / measured:.2f}"]
        cells += [f"{row['factor']:.1f}"]
        cells += [f"{row['trained_factor']:.1f}" if "trained_factor" in row else ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    needed = max(row["factor"] for row in rows)
    trained = max(row["trained_factor"] for row in rows if "trained_factor" in row)
    libraries = max(row["libraries"] for row in rows) / MIB
    lines += [
        "",
        f"The largest factors: {needed:.1f}, in the formula {FACTOR}; of training {trained:.1f}, "
        f"in the formula {TRAINED_FACTOR}. The libraries' own, left out of the table: at most "
        f"{libraries:.0f} MiB, in the formula {LIBRARIES // MIB}.",
    ]
    return "\n".join(lines)


def estimate() -> str:
    """Markdown: GiB on the device and in host memory, and what they consist of."""
    options = Options()
    lines = ["| default options | GPU, GiB | host, GiB | of it |", "|---|---|---|---|"]
    for name, widths in LLAMA_3.items():
        need = llama_3_need(options, name, widths)
        parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in need.parts.items())
        lines.append(f"| {name} | {need.device / GIB:.1f} | {need.host / GIB:.1f} | {parts} |")
    return "\n".join(lines)


def llama_3_need(options: Options, name: str, widths: dict[str, Any]) -> MemoryNeed:
    config = {
        "vocab_size": 128256,
        "num_hidden_layers": 80 if name.endswith("70B") else 32,
        "num_key_value_heads": 8,
        "dtype": "bfloat16",
        **widths,
    }
    length = options.sequence_length
    samples = samples_of(options, find("llama"), config, length)
    windows = max(samples.statistics, samples.hessians, samples.training)
    return needed_memory(find("llama"), config, options, windows, length)


def measure_all() -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, shape in CASES:
            rows.append(measure(name, shape, Path(scratch)))
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory against what is predicted.")
    parser.add_argument("--recount", action="store_true", help="measure nothing anew")
    parser.add_argument("--estimate", action="store_true", help="print the formula's results")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        quantize_and_watch(*options.child)
        return
    if options.estimate:
        print(estimate())
        return
    where = environment()
    if options.recount:
        before = json.loads((RESULTS / "memory.json").read_text())
        measured, where = before["rows"], {key: before[key] for key in where}
    else:
        measured = measure_all()
    rows = [counted(row) for row in measured]
    save("memory", COMMAND, rows, f"{table(rows)}\n\n{estimate()}", where)
    print(table(rows))


if __name__ == "__main__":
    main()

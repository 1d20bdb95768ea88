"""Peak memory of the quantizer beside what its formula says, for two widths and two depths.

    python -m benchmarks.method.memory [--hidden 256 512] [--blocks 2 6]
    python -m benchmarks.method.memory --estimate

Anonymous memory (RssAnon of /proc/self/status) of a process of its own, sampled every 2 ms, minus
what it was after the imports; pages that belong to mapped files are left out, since the kernel
drops them at will. glibc is told to map each tensor of 512 KiB or more by itself, as it does by
default above 32 MiB: below, it keeps freed memory in a heap, and the peak of a model as small as
these is half slack that a real one has not (`--slack` measures with the default).

`--estimate` prints what the formula says for Llama-3's shapes and the default options.
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

from benchmarks.common.record import environment, save
from tests.tiny import make_model, write_text

MIB, GIB = 2**20, 2**30
CONTEXT = 128
METHOD: dict[str, Any] = {
    "statistics_samples": 4,
    "gptq_samples": 16,
    "sequence_length": CONTEXT,
    "reconstruction": "pad",
    "alpha": 1.0,
    "clip_points": 5,
    "gptq_block": 32,
    "weight_search": "minmax",  # the search by error takes half the time and works on slices
    "compensation_rank": 16,
    "compensation_samples": 16,
    "compensation_epochs": 2,
    "device": "cpu",
}
LLAMA_3: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    "Llama-3-70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
}


class Peak(threading.Thread):
    """Samples the anonymous memory of this process until stopped; bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.running = True

    def run(self) -> None:
        while self.running:
            self.bytes = max(self.bytes, anonymous_bytes())
            time.sleep(0.002)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux")


def quantize_and_watch(model: str, output: str, text: str, method: str) -> None:
    """Child process: print the baseline after imports and the peak, in bytes."""
    import mergequant.quantizer.run
    from mergequant import Options

    torch.set_num_threads(1)
    baseline = anonymous_bytes()
    peak = Peak()
    peak.start()
    options = Options.model_validate_json(method)
    mergequant.quantizer.run.quantize(model, output, [text], options, progress=False)
    peak.running = False
    peak.join()
    print(json.dumps({"baseline": baseline, "peak": peak.bytes}))


def measure(
    hidden: int,
    blocks: int,
    scratch: Path,
    method: dict[str, Any] | None = None,
    *,
    slack: bool = False,
) -> dict[str, Any]:
    """Peak of one model, and what was predicted for it.

    Args:
        method: fields of `Options`; `METHOD` if None.
        slack: leave glibc as it is.
    """
    method = METHOD if method is None else method
    model = make_model(
        scratch / f"model-{hidden}-{blocks}",
        blocks=blocks,
        hidden=hidden,
        intermediate=3 * hidden,
        heads=hidden // 32,
        kv_heads=hidden // 64,
        context=CONTEXT,
        dtype=torch.bfloat16,
    )
    text = write_text(scratch / "text.txt", repeats=CONTEXT)
    command = [sys.executable, "-m", "benchmarks.method.memory", "--child", str(model)]
    command += [str(scratch / f"out-{hidden}-{blocks}"), str(text), json.dumps(method)]
    environ = {**os.environ, **({} if slack else {"MALLOC_MMAP_THRESHOLD_": str(MIB // 2)})}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environ)
    memory: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {
        "hidden": hidden,
        "blocks": blocks,
        "model_bytes": (model / "model.safetensors").stat().st_size,
        "imports": memory["baseline"],
        "measured": memory["peak"] - memory["baseline"],
        "predicted": predicted(model, method),
    }


def predicted(model: Path, method: dict[str, Any]) -> int:
    """Bytes that the formula gives for a folder's model on the CPU."""
    from mergequant import Options
    from mergequant.model.architectures import find
    from mergequant.quantizer.memory.needed import needed_memory

    config = json.loads((model / "config.json").read_text())
    options = Options(**method)
    windows = max(options.statistics_samples, options.gptq_samples)
    if options.compensated:
        windows = max(windows, options.compensation_samples)
    architecture = find(config["model_type"])
    return needed_memory(architecture, config, options, windows, options.sequence_length).together


def table(rows: list[dict[str, Any]]) -> str:
    """Table in Markdown."""
    lines = [
        "| hidden | blocks | model, MiB | measured, MiB | predicted, MiB | predicted / measured |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = (row["model_bytes"], row["measured"], row["predicted"])
        cells = [str(row["hidden"]), str(row["blocks"]), *(f"{x / MIB:.0f}" for x in sizes)]
        lines.append(f"| {' | '.join(cells)} | {row['predicted'] / row['measured']:.2f} |")
    for hidden in dict.fromkeys(row["hidden"] for row in rows):
        measured = [row["measured"] for row in rows if row["hidden"] == hidden]
        change = measured[-1] / measured[0] - 1
        lines.append(f"\nHidden {hidden}, the deepest against the shallowest: {change:+.1%}")
    return "\n".join(lines)


def estimate() -> str:
    """Markdown: GiB on the device and in host memory, and what they consist of."""
    from mergequant import Options
    from mergequant.model.architectures import find
    from mergequant.quantizer.memory.needed import needed_memory

    options = Options()
    lines = ["| default options | GPU, GiB | host, GiB | of it |", "|---|---|---|---|"]
    for name, widths in LLAMA_3.items():
        config = {
            "vocab_size": 128256,
            "num_hidden_layers": 80 if name.endswith("70B") else 32,
            "num_key_value_heads": 8,
            "dtype": "bfloat16",
            **widths,
        }
        need = needed_memory(
            find("llama"), config, options, options.gptq_samples, options.sequence_length
        )
        parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in need.parts.items())
        lines.append(f"| {name} | {need.device / GIB:.1f} | {need.host / GIB:.1f} | {parts} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory against width and depth.")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--slack", action="store_true", help="leave glibc's allocator as it is")
    parser.add_argument("--estimate", action="store_true", help="print the formula's results")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        quantize_and_watch(*options.child)
        return
    if options.estimate:
        print(estimate())
        return
    sizes = [(hidden, blocks) for hidden in options.hidden for blocks in options.blocks]
    with tempfile.TemporaryDirectory() as scratch:
        rows = [measure(*size, Path(scratch), slack=options.slack) for size in sizes]
    hidden, blocks = (" ".join(map(str, x)) for x in (options.hidden, options.blocks))
    command = f"python -m benchmarks.method.memory --hidden {hidden} --blocks {blocks}"
    if not options.slack:  # what was published is without
        save("memory", command, rows, f"{table(rows)}\n\n{estimate()}", environment())
    print(table(rows))


if __name__ == "__main__":
    main()

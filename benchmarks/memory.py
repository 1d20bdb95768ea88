"""Peak memory of the quantizer on a shallow and on a deep model of the same width.

    python -m benchmarks.memory [--hidden 512] [--blocks 4 32]

Anonymous memory (RssAnon of /proc/self/status), sampled every 5 ms in a process of its own;
pages that belong to mapped files are left out, since the kernel drops them at will.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.record import environment, save
from tests.tiny import make_model, write_text

MIB = 2**20


class Peak(threading.Thread):
    """Samples the anonymous memory of this process until stopped; bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.running = True

    def run(self) -> None:
        while self.running:
            self.bytes = max(self.bytes, anonymous_bytes())
            time.sleep(0.005)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux")


def quantize_and_watch(model: str, output: str, text: str) -> None:
    """Child process: print the baseline after imports and the peak, in bytes."""
    from mergequant import Options, quantize

    baseline = anonymous_bytes()
    peak = Peak()
    peak.start()
    options = Options(statistics_samples=8, gptq_samples=32, sequence_length=256)
    quantize(model, output, [text], options, progress=False)
    peak.running = False
    peak.join()
    print(json.dumps({"baseline": baseline, "peak": peak.bytes}))


def measure(hidden: int, blocks: int, scratch: Path) -> dict[str, Any]:
    """Peak of one depth."""
    model = make_model(
        scratch / f"model-{blocks}",
        blocks=blocks,
        hidden=hidden,
        intermediate=3 * hidden,
        heads=hidden // 32,
        kv_heads=hidden // 32,
        context=256,
    )
    text = write_text(scratch / "text.txt", repeats=2000)
    command = [sys.executable, "-m", "benchmarks.memory", "--child", str(model)]
    command += [str(scratch / f"out-{blocks}"), str(text)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    size = (model / "model.safetensors").stat().st_size
    return {"blocks": blocks, "model_bytes": size, **found}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| blocks | model, MiB | after imports, MiB | peak, MiB |", "|---|---|---|---|"]
    for row in rows:
        sizes = (row["model_bytes"], row["baseline"], row["peak"])
        lines.append(f"| {row['blocks']} | " + " | ".join(f"{x / MIB:.0f}" for x in sizes) + " |")
    change = rows[-1]["peak"] / rows[0]["peak"] - 1
    lines.append(f"\nPeak of the deepest against the shallowest: {change:+.1%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory against depth.")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        quantize_and_watch(*options.child)
        return
    with tempfile.TemporaryDirectory() as scratch:
        rows = [measure(options.hidden, blocks, Path(scratch)) for blocks in options.blocks]
    depths = " ".join(str(blocks) for blocks in options.blocks)
    command = f"python -m benchmarks.memory --hidden {options.hidden} --blocks {depths}"
    save("memory", command, rows, table(rows), environment())
    print(table(rows))


if __name__ == "__main__":
    main()

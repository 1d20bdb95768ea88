"""Everything that is measured on a GPU, in one command that may be stopped and run again.

    python -m benchmarks.gpu PART... [--minutes 7.5] [--again] [--smoke] [--results FOLDER]

Parts: exact (kernels against the definition), gemm, quantize, trace (kernels a block), serve (vLLM
end to end), plots (from what is on disk), and all: all but the plots. Results go to
FOLDER/DEVICE/PART.json and PART.md. What is done with the same versions, device and kernel sources
is not measured again. Exit status 0: done; 1: `exact` found a difference; 3: time is up, run it
again to go on.

Each part runs in a process of its own, and in another one if that dies.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common.shapes import MODELS

PARTS = ("exact", "gemm", "quantize", "trace", "serve")
RESULTS = Path(__file__).parents[1] / "results"
GRACE = 60  # seconds that a part has to end after its time is up
MOST_RESTARTS = 20
UNFINISHED, DIED = 3, 75


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = make_parser().parse_args(given)
    if options.worker:
        return work(options)
    parts = [p for name in options.parts for p in (PARTS if name == "all" else (name,))]
    if options.smoke and parts == list(PARTS):
        parts = ["exact", "gemm", "quantize"]  # an engine takes minutes: only if asked
    if options.smoke and options.results == RESULTS:
        options.results = Path("/tmp/mergequant-smoke")
    status = 0
    for part in parts:
        if part == "plots":
            from benchmarks.gpu.plots import draw_all

            draw_all(options.results)
            continue
        print(f"== {part}", flush=True)
        status = max(status, supervise(part, given, options))
    return status


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="+", choices=(*PARTS, "plots", "all"), metavar="PART")
    parser.add_argument("--minutes", type=float, default=7.5, help="limit of each part")
    parser.add_argument("--again", action="store_true", help="measure anew what is done")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, also without a GPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--models", nargs="+", choices=MODELS, help="gemm: which shapes")
    parser.add_argument("--kernels", nargs="+", help="exact, gemm: which of ours")
    parser.add_argument("--variants", nargs="+", help="serve, trace: which served variants")
    parser.add_argument("--methods", dest="variants", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--batches", nargs="+", type=int, help="serve: sequences at a time")
    parser.add_argument("--attention", help="serve, trace: attention backend of vLLM")
    parser.add_argument("--worker", nargs=2, metavar=("RUN", "END"), help=argparse.SUPPRESS)
    return parser


def supervise(part: str, given: list[str], options: argparse.Namespace) -> int:
    """Run `part` in processes of its own until it is done; returns its exit status."""
    run, end = f"{time.time():.0f}", time.time() + 60 * options.minutes
    others = [word for word in given if word not in (*PARTS, "plots", "all")]
    command = [sys.executable, "-m", "benchmarks.gpu", part, *others]
    command += ["--results", str(options.results), "--worker", run, f"{end:.0f}"]
    for _ in range(MOST_RESTARTS):
        left = end - time.time()
        if left <= 0:
            print(f"{part}: time is up; run the command again to go on", flush=True)
            return UNFINISHED
        try:
            status = subprocess.run(command, timeout=left + GRACE, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"{part}: stopped, it did not end by itself", flush=True)
            return UNFINISHED
        if status == UNFINISHED:
            print(f"{part}: time is up; run the command again to go on", flush=True)
        if status != DIED and status >= 0:
            return status
        print(f"{part}: its process died ({status}); once more", flush=True)
    return DIED


def work(options: argparse.Namespace) -> int:
    """Run one part in this process."""
    from benchmarks.gpu.run_part import run_part

    run, end = options.worker
    names = ("again", "smoke", "models", "kernels", "variants", "batches", "attention")
    chosen = {name: getattr(options, name) for name in names}
    words = [
        f"--{name.replace('_', '-')} {_words(value)}".strip()
        for name, value in chosen.items()
        if value
    ]
    command = " ".join(["python -m benchmarks.gpu", *options.parts, *words])
    return run_part(options.parts[0], options.results, command, run, float(end), **chosen)


def _words(value: object) -> str:
    if isinstance(value, list):
        return " ".join(str(one) for one in value)
    return "" if value is True else str(value)


if __name__ == "__main__":
    sys.exit(main())

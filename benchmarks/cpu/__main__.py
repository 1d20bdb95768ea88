"""Our kernels on a CPU: single linears, whole models in vLLM, and where the time goes.

    python -m benchmarks.cpu linear  [--models NAME...] [--tokens M...] [--kernel NAME]
    python -m benchmarks.cpu forms   [--models NAME...] [--tokens M...] [--kernel NAME]
    python -m benchmarks.cpu peers   --peers FOLDER [--names NAME...]
    python -m benchmarks.cpu serve   [--methods NAME...] [--layers L] [--peers FOLDER]
    python -m benchmarks.cpu profile [--variant NAME] [--layers L]
    python -m benchmarks.cpu start   [--model NAME | --source FOLDER --checkpoint FOLDER]

`forms` times the linear's other forms against the plain one; `peers` installs others' libraries,
which `linear` and `serve` compare with. Those that measure take
--isa NAME (every library is restricted to that instruction set where it is AVX2; above, nothing is
restricted, or AMX alone with --no-amx), --threads N, --rounds R, --results FOLDER.
Before anything is timed the kernels' tests must pass (--no-tests leaves them out). Results go to
FOLDER/PART-ISA-THREADSt.json and .md; losses are there like wins.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.common.shapes import MODELS
from benchmarks.cpu import instruction_sets, machine, peers
from benchmarks.cpu.peers import AUTO_ROUND

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
KERNELS = "tests/mergequant_vllm/kernels"
TESTS = [f"{KERNELS}/linear/test_cpu_int4.py", f"{KERNELS}/test_native_quantizers.py"]
LINEAR_MODELS = ("Llama-2-7B", "Llama-3-8B", "TinyLlama-1.1B", "Qwen3-0.6B")
REFUSED = 2


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = make_parser().parse_args(given)
    if options.part == "peers":
        peers.install(options.peers, tuple(options.names))
        return 0
    if options.worker:
        return work(options, given)
    cores = machine.cores()
    threads = options.threads or len(cores)
    if threads > len(cores):
        print(f"--threads {threads}: this process may use {len(cores)} cores", file=sys.stderr)
        return REFUSED
    os.sched_setaffinity(0, cores[:threads])
    environment = instruction_sets.environment(options.isa, threads, cores, amx=not options.no_amx)
    # Of others' libraries only the one for single linears; those that serve come one at a time.
    own = getattr(options, "peers", None) if options.part == "linear" else None
    linears = str(own.resolve() / AUTO_ROUND) if own else ""
    paths = (str(ROOT), environment.get("PYTHONPATH", ""), linears)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # Engines write what they do for each step into logs, at the expense of the step.
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if options.part == "serve" else "ERROR")
    if not options.no_tests and not tests_pass(environment):
        print("The kernels' tests fail: nothing is timed.", file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "benchmarks.cpu", *given, "--worker"]
    return subprocess.run(command, env=environment, check=False).returncode


def tests_pass(environment: dict[str, str]) -> bool:
    """Run the tests of the native kernels with the instruction set that is to be timed."""
    command = [sys.executable, "-m", "pytest", "-q", *TESTS]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    print("\n".join(done.stdout.splitlines()[-1 if done.returncode == 0 else -40 :]), flush=True)
    return done.returncode == 0


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = parser.add_subparsers(dest="part", required=True)
    linear = parts.add_parser("linear", help="single linears")
    forms = parts.add_parser("forms", help="single linears in their other forms")
    for part in (linear, forms):
        part.add_argument("--models", nargs="+", choices=MODELS, default=list(LINEAR_MODELS))
        part.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 512])
        part.add_argument("--kernel", default="cpu-int4", help="ours; another to try this out")
    serve = parts.add_parser("serve", help="whole models")
    serve.add_argument(
        "--methods",
        "--variants",
        nargs="+",
        dest="variants",
        metavar="VARIANT",
        help="see benchmarks/cpu/serve/variants.py",
    )
    install = parts.add_parser("peers", help="install others' libraries into a folder")
    install.add_argument("--names", nargs="+", choices=peers.PEERS, default=list(peers.PEERS))
    install.add_argument("--peers", type=Path, required=True)
    for part in (linear, serve):
        part.add_argument("--peers", type=Path, help="folder that part `peers` made")
    profile = parts.add_parser("profile", help="where the time of ours goes")
    profile.add_argument("--variant", default="mergequant")
    profile.add_argument("--method", dest="variant", default="mergequant", help=argparse.SUPPRESS)
    start = parts.add_parser("start", help="seconds to a server's first token, and its memory")
    start.add_argument("--source", type=Path, help="a model in 16 bits, instead of --model")
    start.add_argument("--checkpoint", type=Path, help="what `mergequant quantize` made of it")
    for part in (serve, profile, start):
        part.add_argument("--model", choices=MODELS, default="TinyLlama-1.1B")
    for part in (serve, profile):
        part.add_argument("--layers", type=int, help="fewer than the model has")
        part.add_argument("--prefill", type=int, default=512, help="tokens of the long prompt")
        part.add_argument("--decode", type=int, default=64, help="tokens that are generated")
    for part, rounds in ((linear, 9), (forms, 9), (serve, 3), (profile, 3), (start, None)):
        part.add_argument("--isa", help="instruction set of ours; default: the fastest")
        part.add_argument("--threads", type=int, help="default: all cores")
        if rounds is not None:
            part.add_argument("--rounds", type=int, default=rounds)
        part.add_argument("--results", type=Path, default=RESULTS)
        part.add_argument("--no-amx", action="store_true", help="do not use AMX")
        part.add_argument("--no-tests", action="store_true", help="do not run the tests first")
        part.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def work(options: argparse.Namespace, given: list[str]) -> int:
    """Run a part in this process, whose environment is prepared."""
    from benchmarks.cpu.run_part import PARTS

    threads = options.threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or len(machine.cores())
    words = [word for word in given if word not in ("--worker", "--no-tests")]
    command = " ".join(["python -m benchmarks.cpu", *words])
    try:
        PARTS[options.part](options, threads, command)
    except ValueError as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())

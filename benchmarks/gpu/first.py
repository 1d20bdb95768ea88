"""The first minutes on a GPU: the most important questions in order, whatever breaks on the way.

    python -m benchmarks.gpu.first [--minutes 9] [--model FOLDER] [--checkpoint FOLDER]
        [--text FILE] [--calibration FILE] [--again STEP ...] [--results FOLDER] [--rehearse]

Each step runs in a process of its own with a time limit; what it measures it writes as it goes, and
FOLDER/DEVICE/first.json and first.md say after each step how all of them ended. A step that breaks,
hangs or is killed is written down with its message, and the next one runs. What has ended well is
not run again by a second command, which begins with what broke; MODEL is a 16-bit model,
CHECKPOINT the same one quantized on a CPU with the options of `QUANTIZED`. With --rehearse every
step runs without a GPU, at tiny sizes: kernels in Triton's interpreter, engines of vLLM for CPUs.
Exit status 0: every step that could run ended well; 1: one did not.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common.device import find_device, headline, where
from benchmarks.common.result_cells import write_atomically
from benchmarks.gpu.__main__ import RESULTS

QUANTIZED = "--fast --sequence-length 512 --statistics-samples 16 --gptq-samples 32"
WINDOWS = "--window 1024 --windows 16"  # of the text that a loss is taken on
GRACE = 3.0  # seconds between being asked to end and being killed
LONGEST_MESSAGE = 300


@dataclass(frozen=True)
class Step:
    """One question, and the command that answers it.

    Attributes:
        name: in results and on the command line.
        question: what its figures say.
        command: words between spaces, in which {python}, {model}, {checkpoint}, {text},
            {calibration}, {results} and {scratch} stand for files and folders, and the names of
            `ON_A_GPU` for what a rehearsal does otherwise; a word that stands for nothing is left
            out.
        seconds: it may take at most; {minutes} in the command is a little less.
    """

    name: str
    question: str
    command: str
    seconds: float


# What differs between a GPU and a rehearsal: one engine of vLLM takes half a minute on a CPU.
ON_A_GPU = {
    "smoke": "",
    "device": "cuda",
    "quantized": QUANTIZED,
    "engine": f"--no-enforce-eager {WINDOWS}",
    "one": "",
}
REHEARSED = {
    "smoke": "--smoke",
    "device": "cpu",
    "quantized": "--fast --sequence-length 32 --statistics-samples 2 --gptq-samples 2",
    "engine": "--enforce-eager --window 64 --windows 2",
    "one": "--variants mergequant",
}
PART = "{python} -m benchmarks.gpu %s --minutes {minutes} --results {results} {smoke}"
COMMAND = "{python} -m mergequant.cli"
STEPS = (
    Step("imports", "Do the wheel, the plugin and vLLM load?", f"{COMMAND} doctor", 60),
    Step("exact", "Does every kernel equal its definition?", PART % "exact", 90),
    Step(
        "gemm",
        "What are the limits, and how near to them is each kernel?",
        PART % "gemm --models Llama-3-8B",
        110,
    ),
    Step(
        "quantize",
        "Does quantizing on the GPU give a checkpoint?",
        f"{COMMAND} quantize {{model}} {{scratch}}/quantized --calibration {{calibration}} "
        "--device {device} --quiet {quantized}",
        80,
    ),
    Step(
        "codes",
        "How many codes differ from those of a CPU?",
        "{python} -m benchmarks.gpu.differing_codes {checkpoint} {scratch}/quantized",
        30,
    ),
    Step(
        "loss",
        "Does vLLM serve it with CUDA graphs, and at what loss?",
        f"{COMMAND} perplexity {{checkpoint}} --text {{text}} --dtype bfloat16 {{engine}}",
        110,
    ),
    Step("trace", "Which kernels run in a block?", PART % "trace {one}", 100),
    Step(
        "serve",
        "How fast are prefill and decode of a 7B model, beside bf16, W4A16 and FP8?",
        PART % "serve {one}",
        170,
    ),
)


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    Attributes:
        step: its name.
        status: `done`, `failed`, `killed`, `timed out`, `no time` or `left out`.
        message: one line: what it printed last, or why it did not end well.
        seconds: that it took.
    """

    step: str
    status: str
    message: str = ""
    seconds: float = 0.0

    @property
    def is_open(self) -> bool:
        """Whether a second command is to run it again."""
        return self.status != "done"


def run_step(name: str, command: Sequence[str], seconds: float, log: Path) -> Outcome:
    """Run one step to its end or for `seconds`; all that it started ends with it.

    Args:
        name: of the step.
        command: its words, filled in.
        log: file that gets what it prints.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("w") as out:
        try:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return Outcome(name, "failed", f"{type(error).__name__}: {error}")
        try:
            status, in_time = process.wait(timeout=seconds), True
        except subprocess.TimeoutExpired:
            status, in_time = 0, False
        _end_group(process)
    took = round(time.monotonic() - began, 1)
    last = last_line(log)
    if not in_time:
        return Outcome(name, "timed out", f"after {seconds:.0f} s; last: {last}", took)
    if status < 0:
        sign = signal.Signals(-status).name
        hint = " (out of memory?)" if sign == "SIGKILL" else ""
        return Outcome(name, "killed", f"by {sign}{hint}; last: {last}", took)
    if status > 0:
        return Outcome(name, "failed", f"exit status {status}: {last}", took)
    return Outcome(name, "done", last, took)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End whatever is left of a step: engines start processes that outlive their parent."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except (ProcessLookupError, PermissionError):
            break
        end = time.monotonic() + (GRACE if sign == signal.SIGTERM else 0)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
    process.wait()


def last_line(log: Path) -> str:
    """Return the last line of a file that is not blank, cut to a length that a table bears."""
    lines = [x.strip() for x in log.read_text(errors="replace").splitlines() if x.strip()]
    return lines[-1][:LONGEST_MESSAGE] if lines else "nothing printed"


def in_order(steps: Sequence[Step], known: Mapping[str, Outcome]) -> list[Step]:
    """What is to be run: first what broke, then what never ran; each in the order of `steps`."""
    broke = [x for x in steps if x.name in known and known[x.name].is_open]
    return broke + [x for x in steps if x.name not in known]


def filled(step: Step, given: Mapping[str, str | None], seconds: float) -> list[str] | str:
    """The step's command with names replaced by what they stand for, or why it cannot run."""
    minutes = f"{max(0.1, (seconds - 10) / 60):.2f}"
    names = {"python": sys.executable, "minutes": minutes, **ON_A_GPU, **given}
    missing = [x for x, value in names.items() if value is None and f"{{{x}}}" in step.command]
    if missing:
        return "needs " + " and ".join(f"--{name}" for name in missing)
    command = step.command
    for name in ON_A_GPU:  # any number of words each; a file's name stays one, whatever is in it
        command = command.replace(f"{{{name}}}", names[name] or "")
    return [word.format(**names) for word in command.split()]


def run_all(
    steps: Sequence[Step], given: Mapping[str, str | None], folder: Path, minutes: float
) -> dict[str, Outcome]:
    """Run what is open, in order, while there is time; returns every step's outcome by name.

    Args:
        given: see `Step.command`; None: not given.
        folder: of this device; gets `first.json`, `first.md` and a log of each step.
        minutes: for all of them.
    """
    end = time.monotonic() + 60 * minutes
    known = read_outcomes(folder)
    for step in in_order(steps, known):
        seconds = min(step.seconds, end - time.monotonic())
        ready = filled(step, given, seconds)
        if isinstance(ready, str):
            outcome = Outcome(step.name, "left out", ready)
        elif seconds <= 1:
            outcome = Outcome(step.name, "no time", "run the command again")
        else:
            print(f"== {step.name}: {step.question}", flush=True)
            outcome = run_step(step.name, ready, seconds, folder / "first" / f"{step.name}.log")
        known[step.name] = outcome
        print(f"   {outcome.status}, {outcome.seconds:.0f} s: {outcome.message}", flush=True)
        write_outcomes(folder, steps, known)
    return known


def read_outcomes(folder: Path) -> dict[str, Outcome]:
    """What an earlier command left of each step, by name."""
    file = folder / "first.json"
    if not file.exists():
        return {}
    return {x["step"]: Outcome(**x) for x in json.loads(file.read_text())["steps"]}


def write_outcomes(folder: Path, steps: Sequence[Step], known: Mapping[str, Outcome]) -> None:
    """Write `first.json` and `first.md`."""
    place = where(find_device())
    rows = [known[step.name] for step in steps if step.name in known]
    record = {**place, "steps": [asdict(x) for x in rows]}
    write_atomically(folder / "first.json", json.dumps(record, indent=2) + "\n")
    questions = {step.name: step.question for step in steps}
    lines = [headline(place), ""]
    lines += ["| step | question | how it ended | seconds | message |", "|---|---|---|---:|---|"]
    for x in rows:
        message = x.message.replace("|", "\\|")
        question = questions[x.step]
        lines.append(f"| {x.step} | {question} | {x.status} | {x.seconds:.0f} | {message} |")
    write_atomically(folder / "first.md", "\n".join(lines) + "\n")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.first",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps")
    parser.add_argument("--model", help="folder of a 16-bit model")
    parser.add_argument("--checkpoint", help="folder of the same, quantized on a CPU")
    parser.add_argument("--text", help="to evaluate on")
    parser.add_argument("--calibration", help="to quantize with")
    parser.add_argument("--again", nargs="+", default=[], choices=[x.name for x in STEPS])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--rehearse", action="store_true", help="on stand-ins, without a GPU")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.rehearse and options.results == RESULTS:
        parser.error("--rehearse measures nothing: give --results a folder of its own.")
    folder = options.results / find_device().folder
    known = read_outcomes(folder)
    kept = {name: x for name, x in known.items() if name not in options.again}
    if len(kept) < len(known):
        write_outcomes(folder, STEPS, kept)
    scratch = folder / "first" / "scratch"
    if "quantize" in options.again:
        shutil.rmtree(scratch, ignore_errors=True)
    if options.rehearse:  # an engine in a process of its own takes twice as long to start
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    names = ("model", "checkpoint", "text", "calibration")
    given = {name: getattr(options, name) for name in names}
    given |= {"results": str(options.results), "scratch": str(scratch)}
    given |= REHEARSED if options.rehearse else {}
    outcomes = run_all(STEPS, given, folder, options.minutes)
    ended = [x for x in outcomes.values() if x.status != "left out"]
    print(f"{sum(not x.is_open for x in ended)} of {len(ended)} steps ended well", flush=True)
    return 1 if any(x.is_open for x in ended) else 0


if __name__ == "__main__":
    sys.exit(main())

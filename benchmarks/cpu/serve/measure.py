"""Part `serve`: a model of random weights end to end, ours against others, two at a time.

Ours stays; the others come one after another and are measured in turns with it, so that both see
much the same machine and no more than two models are in memory. Prefill: one token after a prompt
of `prefill` tokens. Decoding: `decode` tokens and one more after a short prompt, less the time that
the one takes; batch 1 and 8. Nothing is cached between requests.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.shapes import MODELS
from benchmarks.cpu.serve.baselines import CONTENDERS, DEFAULT, OURS
from benchmarks.cpu.serve.child_dialogue import Dialogue, DiedError, python_path

ROOT = Path(__file__).parents[3]
BATCHES = (1, 8)
SHORT_PROMPT = 16
START_SECONDS = 1800.0  # compiling takes minutes on a slow machine
ASK_SECONDS = 900.0
LONG_SECONDS = 120.0  # a rival whose round takes longer is asked only once

Progress = Callable[[Sequence[Mapping[str, Any]]], None]


def run(options: argparse.Namespace, isa: str, threads: int, log: Path, progress: Progress) -> None:
    """Measure ours with each rival; `progress` is called with all rows so far after each."""
    methods = methods_of(options)
    unknown = [name for name in methods if name not in CONTENDERS]
    if unknown:
        raise ValueError(f"--methods {' '.join(unknown)}: choose from {', '.join(CONTENDERS)}")
    ours = ours_of(methods)
    rows: list[dict[str, Any]] = []
    first = Opponent(ours, options, isa, threads, log)
    print(f"  {ours} is up: {first.facts}", flush=True)
    try:
        for name in [name for name in methods if name != ours] or [ours]:
            rows.append(duel(first, name, options, isa, threads, log))
            progress(rows)
            print(f"  {line(rows[-1])}", flush=True)
    finally:
        first.close()


def methods_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Names of the contenders."""
    return tuple(options.methods or DEFAULT)


def ours_of(methods: Sequence[str]) -> str:
    """The one that stays: the first, if it is one of ours."""
    known = CONTENDERS.get(methods[0])
    return methods[0] if known is not None and known.ours else OURS


def duel(
    ours: "Opponent", name: str, options: argparse.Namespace, isa: str, threads: int, log: Path
) -> dict[str, Any]:
    """Rounds of ours and `name` in turns.

    Returns:
        `name`; `ours` and `theirs`: `facts`, and by phase the seconds of each round; or `failed`.
    """
    row: dict[str, Any] = {"name": name, "ours": {"name": ours.name, "facts": ours.facts}}
    if CONTENDERS[name].method is None and options.llama_path is None:
        return {**row, "refused": "name the folder of llama-cpp-python with --llama-path"}
    rival = ours
    try:
        if name != ours.name:
            rival = Opponent(name, options, isa, threads, log)
        both = [ours] if rival is ours else [ours, rival]
        times: dict[str, list[dict[str, float]]] = {one.name: [] for one in both}
        for number in range(options.rounds):
            for one in both if number % 2 == 0 else both[::-1]:
                times[one.name].append(one.round(options))
            if sum(times[name][0].values()) > LONG_SECONDS:
                break
        row["ours"]["rounds"] = times[ours.name]
        row["theirs"] = {"facts": rival.facts, "rounds": times[name]}
    except DiedError as death:
        row["failed"] = str(death)
    finally:
        if rival is not ours:
            rival.close()
    return row


def phases(options: argparse.Namespace) -> dict[str, tuple[int, int, int]]:
    """What is asked of an engine in a round: batch, tokens of a prompt, tokens generated."""
    found = {"prefill": (1, options.prefill, 1)}
    for batch in BATCHES:
        found[f"first {batch}"] = (batch, SHORT_PROMPT, 1)
        found[f"decode {batch}"] = (batch, SHORT_PROMPT, options.decode + 1)
    return found


class Opponent:
    """One contender, started; DiedError if it does not start."""

    def __init__(
        self, name: str, options: argparse.Namespace, isa: str, threads: int, log: Path
    ) -> None:
        self.name = name
        model = MODELS[options.model]
        arguments = ["--contender", name, "--model", options.model, "--isa", isa]
        arguments += ["--layers", str(options.layers or model.num_hidden_layers)]
        context = max(options.prefill, SHORT_PROMPT + options.decode) + 16
        arguments += ["--context", str(context), "--batch", str(max(BATCHES))]
        arguments += ["--threads", str(threads), *(["--no-amx"] if options.no_amx else [])]
        environment = dict(os.environ)
        if CONTENDERS[name].method is None:
            environment["PYTHONPATH"] = python_path(options.llama_path, ROOT)
        self.dialogue = Dialogue(
            "benchmarks.cpu.serve.child", arguments, environment, log / f"serve-{name}.log"
        )
        try:
            self.facts = self.dialogue.listen(START_SECONDS)
        except DiedError:
            self.dialogue.close()
            raise

    def round(self, options: argparse.Namespace) -> dict[str, float]:
        """Seconds of each phase."""
        return {
            phase: float(self.dialogue.ask(" ".join(map(str, words)), ASK_SECONDS)["seconds"])
            for phase, words in phases(options).items()
        }

    def close(self) -> None:
        """End it."""
        self.dialogue.close()


def line(row: Mapping[str, Any]) -> str:
    """What is printed after a rival."""
    trouble = row.get("refused") or row.get("failed")
    if trouble:
        return f"{row['name']}: {trouble}"
    first = row["theirs"]["rounds"][0]
    return f"{row['name']}, s: " + ", ".join(f"{key} {value:.2f}" for key, value in first.items())

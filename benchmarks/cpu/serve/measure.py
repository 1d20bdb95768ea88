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
from benchmarks.cpu import peers
from benchmarks.cpu.linear.limits import CACHES, bandwidth
from benchmarks.cpu.machine import cache_bytes
from benchmarks.cpu.serve.child_process import ChildProcess, DiedError, python_path
from benchmarks.cpu.serve.variants import DEFAULT_VARIANTS, OURS, VARIANTS

ROOT = Path(__file__).parents[3]
BATCHES = (1, 8)
SHORT_PROMPT = 16
BANDWIDTH_TRIES = 5
START_SECONDS = 1800.0  # compiling takes minutes on a slow machine
REQUEST_SECONDS = 900.0
LONG_SECONDS = 120.0  # a variant whose round takes longer is measured in one round

Progress = Callable[[Sequence[Mapping[str, Any]]], None]


def run(options: argparse.Namespace, isa: str, threads: int, log: Path, progress: Progress) -> None:
    """Measure ours with each other variant; `progress` gets all rows so far after each."""
    variants = variants_of(options)
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        raise ValueError(f"--methods {' '.join(unknown)}: choose from {', '.join(VARIANTS)}")
    ours = ours_of(variants)
    rows: list[dict[str, Any]] = []
    first = RunningVariant(ours, options, isa, threads, log)
    print(f"  {ours} is up: {first.facts}", flush=True)
    try:
        for name in [name for name in variants if name != ours] or [ours]:
            rows.append(compare_pairwise(first, name, options, isa, threads, log))
            progress(rows)
            print(f"  {line(rows[-1])}", flush=True)
    finally:
        first.close()


def variants_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Names of the variants to measure."""
    return tuple(options.variants or DEFAULT_VARIANTS)


def ours_of(variants: Sequence[str]) -> str:
    """Name of the variant that stays: the first, if it is one of ours."""
    known = VARIANTS.get(variants[0])
    return variants[0] if known is not None and known.ours else OURS


def compare_pairwise(
    ours: "RunningVariant",
    name: str,
    options: argparse.Namespace,
    isa: str,
    threads: int,
    log: Path,
) -> dict[str, Any]:
    """Run rounds of ours and `name` in turns.

    Returns:
        `name`; `ours` and `theirs`: `facts`, and by phase the seconds of each round; or `failed`;
        `bandwidth`: bytes/s that were read from memory before.
    """
    row: dict[str, Any] = {"name": name, "ours": {"name": ours.name, "facts": ours.facts}}
    peer = VARIANTS[name].peer
    reason = peers.refusal(options.peers, peer) if peer else None
    if reason is not None:
        return {**row, "refused": reason}
    other = ours
    try:
        if name != ours.name:
            other = RunningVariant(name, options, isa, threads, log)
        both = [ours] if other is ours else [ours, other]
        times: dict[str, list[dict[str, float]]] = {one.name: [] for one in both}
        row["bandwidth"] = bandwidth(CACHES * cache_bytes(), BANDWIDTH_TRIES)
        for number in range(options.rounds):
            for one in both if number % 2 == 0 else both[::-1]:
                times[one.name].append(one.round(options))
            if sum(times[name][0].values()) > LONG_SECONDS:
                break
        row["ours"]["rounds"] = times[ours.name]
        row["theirs"] = {"facts": other.facts, "rounds": times[name]}
    except DiedError as death:
        row["failed"] = str(death)
    finally:
        if other is not ours:
            other.close()
    return row


def phases(options: argparse.Namespace) -> dict[str, tuple[int, int, int]]:
    """Requests of a round by phase: batch, tokens of a prompt, tokens generated."""
    requests = {"prefill": (1, options.prefill, 1)}
    for batch in BATCHES:
        requests[f"first {batch}"] = (batch, SHORT_PROMPT, 1)
        requests[f"decode {batch}"] = (batch, SHORT_PROMPT, options.decode + 1)
    return requests


class RunningVariant:
    """A variant in a process of its own; DiedError if it does not start."""

    def __init__(
        self, name: str, options: argparse.Namespace, isa: str, threads: int, log: Path
    ) -> None:
        self.name = name
        model = MODELS[options.model]
        arguments = ["--variant", name, "--model", options.model, "--isa", isa]
        arguments += ["--layers", str(options.layers or model.num_hidden_layers)]
        context = max(options.prefill, SHORT_PROMPT + options.decode) + 16
        arguments += ["--context", str(context), "--batch", str(max(BATCHES))]
        arguments += ["--threads", str(threads), *(["--no-amx"] if options.no_amx else [])]
        environment = {**os.environ, **VARIANTS[name].environment}
        if VARIANTS[name].peer:
            environment["PYTHONPATH"] = python_path(options.peers / VARIANTS[name].peer, ROOT)
        self.process = ChildProcess(
            "benchmarks.cpu.serve.child", arguments, environment, log / f"serve-{name}.log"
        )
        try:
            self.facts = self.process.receive(START_SECONDS)
        except DiedError:
            self.process.close()
            raise

    def round(self, options: argparse.Namespace) -> dict[str, float]:
        """Return the seconds of each phase."""
        return {
            phase: float(
                self.process.request(" ".join(map(str, words)), REQUEST_SECONDS)["seconds"]
            )
            for phase, words in phases(options).items()
        }

    def close(self) -> None:
        """End the process."""
        self.process.close()


def line(row: Mapping[str, Any]) -> str:
    """Line that is printed after a variant."""
    reason = row.get("refused") or row.get("failed")
    if reason:
        return f"{row['name']}: {reason}"
    first = row["theirs"]["rounds"][0]
    return f"{row['name']}, s: " + ", ".join(f"{key} {value:.2f}" for key, value in first.items())

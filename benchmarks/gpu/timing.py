"""Times of calls that are compared with one another: interleaved, median and spread.

On a GPU the calls of one subject are captured in a CUDA graph and the graph is replayed between two
events, so that launching costs nothing; where capture fails the calls are enqueued one by one
between two events. On a CPU a clock is read. Each record says which (`timer`).

A subject is a list of calls that do the same work on different copies of the weights, together
larger than the cache, so that weights are read from memory as a server reads them.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from benchmarks.common.device import Device, synchronize
from benchmarks.common.result_cells import Refused, SubjectDiedError, sentence

Call = Callable[[], object]
_event: Any = torch.cuda.Event  # which PyTorch does not type
ROUNDS = 7
ROUND_SECONDS = 0.004  # the shortest time that one subject runs in a round
_LARGEST_REPEAT = 2000
_MOST_LOOPS = 16


class Runner(Protocol):
    """One subject, made ready.

    Attributes:
        timer: how it is timed.
        calls: how many calls `seconds` makes at a time.
    """

    timer: str
    calls: int

    def seconds(self, repeat: int) -> float:
        """Time of `repeat` times all calls, in seconds."""


class GraphRunner:
    """Replays of a CUDA graph between two events."""

    timer = "graph"

    def __init__(self, calls: Sequence[Call], round_seconds: float) -> None:
        warm_up(calls)
        # Short calls are repeated within the graph, so that gaps between replays do not count.
        once = _between_events(functools.partial(_call_all, calls), 1)
        loops = max(1, min(_MOST_LOOPS, round(round_seconds / max(once, 1e-7))))
        self.calls = loops * len(calls)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(loops):
                _call_all(calls)
        self.graph.replay()
        torch.cuda.synchronize()

    def seconds(self, repeat: int) -> float:
        """Time `repeat` times all calls, in seconds; see `Runner`."""
        return _between_events(self.graph.replay, repeat)


class EventRunner:
    """Calls enqueued one after another between two events; launching is part of the time."""

    timer = "events"

    def __init__(self, calls: Sequence[Call]) -> None:
        self.list, self.calls = calls, len(calls)
        warm_up(calls)
        torch.cuda.synchronize()

    def seconds(self, repeat: int) -> float:
        """Time `repeat` times all calls, in seconds; see `Runner`."""
        return _between_events(functools.partial(_call_all, self.list), repeat)


class ClockRunner:
    """Calls on a CPU, timed by its clock."""

    timer = "clock"

    def __init__(self, calls: Sequence[Call]) -> None:
        self.list, self.calls = calls, len(calls)
        calls[0]()

    def seconds(self, repeat: int) -> float:
        """Time `repeat` times all calls, in seconds; see `Runner`."""
        begin = time.perf_counter()
        for _ in range(repeat):
            _call_all(self.list)
        return time.perf_counter() - begin


def warm_up(calls: Sequence[Call]) -> None:
    """Make the first calls, in which kernels are compiled and chosen."""
    for call in (*calls[:1], *calls[:1], *calls):
        call()


def _call_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _between_events(call: Call, repeat: int) -> float:
    begin, end = (_event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeat):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def make_runner(
    calls: Sequence[Call], device: Device, *, graphs: bool = True, round_seconds: float = 0.0
) -> Runner:
    """The runner for `device`; `graphs` False: launching is to be part of the time."""
    if not device.is_gpu:
        return ClockRunner(calls)
    if not graphs:
        return EventRunner(calls)
    try:
        return GraphRunner(calls, round_seconds)
    except Exception as error:  # what cannot be captured may still run
        torch.cuda.synchronize()
        runner = EventRunner(calls)
        runner.timer = f"events ({sentence(error)[:120]})"
        return runner


def compare(
    subjects: Mapping[str, Callable[[], Sequence[Call]]],
    device: Device,
    *,
    rounds: int = ROUNDS,
    round_seconds: float = ROUND_SECONDS,
    launches: frozenset[str] = frozenset(),
    dead: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Time `subjects` against one another.

    Args:
        subjects: for each name what makes its calls; Refused and other exceptions are recorded.
        launches: names whose launching is part of the time.
        dead: names that are not to be touched, with the reason.

    Returns:
        for each name `us` (median over the rounds, of one call), `low`, `high`, `timer`; or
        `refused`, or `failed`.

    Raises:
        SubjectDiedError: a subject failed and the device does not answer any more.
    """
    results: dict[str, dict[str, Any]] = {}
    ready: dict[str, tuple[Runner, int]] = {}
    for name, make in subjects.items():
        if dead and name in dead:
            results[name] = {"failed": dead[name]}
            continue
        try:
            runner = make_runner(
                make(), device, graphs=name not in launches, round_seconds=round_seconds
            )
            ready[name] = (runner, repeats(runner, round_seconds))
        except Refused as reason:
            results[name] = {"refused": str(reason)}
        except Exception as error:  # recorded beside the others
            results[name] = {"failed": sentence(error)}
            _check_alive(device, name)
    times: dict[str, list[float]] = {name: [] for name in ready}
    names = list(ready)
    for number in range(rounds):
        turn = number % max(len(names), 1)  # another one begins each round
        for name in names[turn:] + names[:turn]:
            runner, repeat = ready[name]
            times[name].append(runner.seconds(repeat) / (repeat * runner.calls) * 1e6)
    for name, (runner, _) in ready.items():
        results[name] = {**summary(times[name]), "timer": runner.timer}
    return {name: results[name] for name in subjects}


def _check_alive(device: Device, subject: str) -> None:
    try:
        synchronize(device)
    except Exception as error:
        raise SubjectDiedError(subject, error) from error


def repeats(runner: Runner, round_seconds: float) -> int:
    """How often a runner repeats in a round; once if the round may be of any length."""
    if not round_seconds:
        return 1
    once = max(runner.seconds(1), 1e-7)
    return max(1, min(_LARGEST_REPEAT, round(round_seconds / once)))


def summary(microseconds: Sequence[float]) -> dict[str, Any]:
    """Median, least and largest of the rounds."""
    return {
        "us": round(statistics.median(microseconds), 3),
        "low": round(min(microseconds), 3),
        "high": round(max(microseconds), 3),
        "rounds": len(microseconds),
    }

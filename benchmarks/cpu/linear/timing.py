"""Times of calls on a CPU, in turns, and ratios of what ran in the same turn.

The speed of a shared machine drifts; two calls of one round see much the same machine. So every
round times each subject once, another one first each time, and a ratio is formed within a round.
Quartiles of the ratios over the rounds say how far they may be trusted.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.common.result_cells import Refused, sentence

Call = Callable[[], object]
ROUNDS = 9
ROUND_SECONDS = 0.05  # that a subject runs in a round, at least one call
SLOW = 1.0  # seconds of one call
SUBJECT_SECONDS = 20.0  # a subject that needs longer for all rounds takes part in fewer


@dataclass
class Subject:
    """Calls that do the same work on different copies of the weights, one after another.

    Attributes:
        calls: one for each copy.
        repeat: calls in a round.
        rounds: in how many it takes part.
        next: which copy is used next; a round goes on where the last one stopped, so that no copy
            is still in the cache.
    """

    calls: Sequence[Call]
    repeat: int = 1
    rounds: int = ROUNDS
    next: int = 0

    def seconds(self) -> float:
        """Time of one call, mean over `repeat`."""
        begin = time.perf_counter()
        for _ in range(self.repeat):
            self.calls[self.next]()
            self.next = (self.next + 1) % len(self.calls)
        return (time.perf_counter() - begin) / self.repeat


def prepare(
    calls: Sequence[Call], rounds: int, round_seconds: float, check: Callable[[object], None]
) -> Subject:
    """Run every copy once, so that all is allocated and chosen, and plan the rounds."""
    subject = Subject(calls)
    begin = time.perf_counter()
    result = calls[0]()
    once = time.perf_counter() - begin
    check(result)
    if once < SLOW:  # what is slow anyway does not have to be warm to the last page
        for _ in calls[1:]:
            subject.seconds()
        once = subject.seconds()
    subject.repeat = max(1, round(round_seconds / max(once, 1e-7)))
    subject.rounds = max(1, min(rounds, int(SUBJECT_SECONDS / (once * subject.repeat))))
    return subject


def compare(
    subjects: Mapping[str, Callable[[], Sequence[Call]]],
    *,
    rounds: int = ROUNDS,
    round_seconds: float = ROUND_SECONDS,
    check: Callable[[str, object], None] = lambda name, result: None,
) -> dict[str, dict[str, Any]]:
    """Time `subjects` against one another.

    Args:
        subjects: for each name what makes its calls; Refused and other exceptions are recorded.
        check: raises if what a subject returned is wrong.

    Returns:
        for each name `seconds`: of one call in each round that it took part in, and `copies`;
        or `refused`, or `failed`.
    """
    results: dict[str, dict[str, Any]] = {}
    ready: dict[str, Subject] = {}
    for name, make in subjects.items():
        try:
            ready[name] = prepare(make(), rounds, round_seconds, partial(check, name))
            results[name] = {"seconds": [], "copies": len(ready[name].calls)}
        except Refused as reason:
            results[name] = {"refused": str(reason)}
        except Exception as error:  # recorded beside the others
            results[name] = {"failed": sentence(error)}
    names = list(ready)
    for number in range(rounds):
        turn = number % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            if number < ready[name].rounds:
                results[name]["seconds"].append(ready[name].seconds())
    return results


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """How many times faster ours is: median over the rounds of both, lower and upper quartile."""
    return quartiles([b / a for a, b in zip(ours, theirs, strict=False)])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high

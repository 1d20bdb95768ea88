"""Goals of the plan, as arithmetic: what is wanted, what was measured, reached or not."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        text: what is wanted, in words.
        wanted: the figure.
        measured: the figure, None if nothing was measured.
        most: True: `measured` is to be `wanted` at most; False: at least.
        detail: which cell, kernel or setting `measured` comes from.
    """

    text: str
    wanted: float
    measured: float | None
    most: bool = False
    detail: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None if nothing was measured."""
        if self.measured is None or math.isnan(self.measured):
            return None
        return self.measured <= self.wanted if self.most else self.measured >= self.wanted

    def line(self) -> str:
        """One line of Markdown."""
        word = {None: "not measured", True: "reached", False: "NOT reached"}[self.reached]
        bound = f"at most {self.wanted:g}" if self.most else f"at least {self.wanted:g}"
        if self.measured is None:
            return f"- **{word}**: {self.text} ({bound})"
        detail = f"; {self.detail}" if self.detail else ""
        return f"- **{word}**: {self.text}: {self.measured:.3g} ({bound}{detail})"


def worst(text: str, wanted: float, measured: dict[str, float], *, most: bool = False) -> Goal:
    """A goal that every one of `measured` (by name) has to reach; the worst one is shown."""
    if not measured:
        return Goal(text, wanted, None, most)
    choose = max if most else min
    name = choose(measured, key=lambda key: measured[key])
    count = sum(bool(Goal("", wanted, value, most).reached) for value in measured.values())
    detail = f"worst: {name}; {count} of {len(measured)} reach it"
    return Goal(text, wanted, measured[name], most, detail)


def lines(goals: Iterable[Goal]) -> str:
    """Markdown of all goals."""
    return "\n".join(goal.line() for goal in goals)

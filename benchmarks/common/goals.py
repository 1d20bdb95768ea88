"""Goals of the plan, as arithmetic: what was wanted, what was found, reached or not."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        text: what is wanted, in words.
        wanted: the figure.
        found: the figure measured, None if there is none.
        most: True: `found` is to be `wanted` at most; False: at least.
        detail: which cell, kernel or setting `found` comes from.
    """

    text: str
    wanted: float
    found: float | None
    most: bool = False
    detail: str = ""

    @property
    def reached(self) -> bool | None:
        """None if nothing was measured."""
        if self.found is None or math.isnan(self.found):
            return None
        return self.found <= self.wanted if self.most else self.found >= self.wanted

    def line(self) -> str:
        """One line of Markdown."""
        word = {None: "not measured", True: "reached", False: "NOT reached"}[self.reached]
        bound = f"at most {self.wanted:g}" if self.most else f"at least {self.wanted:g}"
        if self.found is None:
            return f"- **{word}**: {self.text} ({bound})"
        detail = f"; {self.detail}" if self.detail else ""
        return f"- **{word}**: {self.text}: {self.found:.3g} ({bound}{detail})"


def worst(text: str, wanted: float, found: dict[str, float], *, most: bool = False) -> Goal:
    """A goal that every one of `found` (by name) has to reach; the worst one is shown."""
    if not found:
        return Goal(text, wanted, None, most)
    choose = max if most else min
    name = choose(found, key=lambda key: found[key])
    count = sum(bool(Goal("", wanted, value, most).reached) for value in found.values())
    detail = f"worst: {name}; {count} of {len(found)} reach it"
    return Goal(text, wanted, found[name], most, detail)


def lines(goals: Iterable[Goal]) -> str:
    """Markdown of all goals."""
    return "\n".join(goal.line() for goal in goals)

"""Targets: a pattern on full module names, and what the linears that it matches are like.

A pattern is a module's exact name, or `re:` and a regular expression that must match from the
name's beginning, as compressed-tensors writes them.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pydantic import field_validator

from mergequant_vllm.format.linear import LinearForm, Strict

REGULAR = "re:"


class Target(Strict):
    """What the linears that `pattern` matches are like; `linear` None: they stay as they are."""

    pattern: str
    linear: LinearForm | None

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        check_pattern(pattern)
        return pattern


def check_pattern(pattern: str) -> None:
    """Raise ValueError unless the pattern is a name or a regular expression that compiles."""
    if not pattern.removeprefix(REGULAR):
        raise ValueError("a pattern is a module's name, or re: and a regular expression")
    if pattern.startswith(REGULAR):
        try:
            re.compile(pattern.removeprefix(REGULAR))
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression ({error})") from error


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a module's full name."""
    if pattern.startswith(REGULAR):
        return re.match(pattern.removeprefix(REGULAR), name) is not None
    return pattern == name


def form_of(targets: Sequence[Target], name: str) -> LinearForm | None:
    """What the last target that matches `name` says; None: the linear is not quantized."""
    for target in reversed(targets):
        if matches(target.pattern, name):
            return target.linear
    return None


def shortest_targets(
    forms: Mapping[str, LinearForm | None], roles: Mapping[str, str]
) -> list[Target]:
    """Write what each linear is like as few targets.

    A role, such as `model.layers.{block}.mlp.up_proj`, is what a linear is called in each block.
    Each role's usual form comes first, roles of one form together; then, form by form, the linears
    that differ from it, by name.

    Args:
        forms: what each linear is like, by full name; None: it is not quantized.
        roles: the role of each, by full name, with `{block}` for the block's number.
    """
    members: dict[str, list[str]] = {}
    for name in forms:
        members.setdefault(roles[name], []).append(name)
    usual = {role: _usual(forms[name] for name in names) for role, names in members.items()}
    targets = [
        Target(pattern=_pattern([x for x in usual if usual[x] == form]), linear=form)
        for form in _distinct(usual.values())
        if form is not None
    ]
    unusual = {name: form for name, form in forms.items() if form != usual[roles[name]]}
    for form in _distinct(unusual.values()):
        names = [name for name in unusual if unusual[name] == form]
        targets.append(Target(pattern=_pattern(names), linear=form))
    return targets


def _usual(forms: Iterable[LinearForm | None]) -> LinearForm | None:
    """The most frequent form; of equals the first."""
    return Counter(forms).most_common(1)[0][0]


def _distinct(forms: Iterable[LinearForm | None]) -> Iterator[LinearForm | None]:
    yield from dict.fromkeys(forms)


def _pattern(names: Sequence[str]) -> str:
    """One pattern for names in which `{block}` stands for any number."""
    if len(names) == 1 and "{block}" not in names[0]:
        return names[0]
    spelled = [re.escape(x).replace(re.escape("{block}"), r"\d+") for x in names]
    start = _common_start(spelled)
    rest = "|".join(x.removeprefix(start) for x in spelled)
    return f"{REGULAR}{start}({rest})$" if len(names) > 1 else f"{REGULAR}{spelled[0]}$"


def _common_start(names: Sequence[str]) -> str:
    """The longest beginning, in whole parts between dots, that all names share."""
    first = names[0].split(r"\.")
    for size in range(len(first) - 1, 0, -1):
        start = r"\.".join(first[:size]) + r"\."
        if all(name.startswith(start) for name in names):
            return start
    return ""

"""Other forms of a linear against the plain one: what segments, zero points and widths cost.

Each form is the same N x K in our kernel; the plain one is W4A4 with a step per output channel.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.random_linears import laid_out, make_codes, make_linear, make_token_step
from benchmarks.common.result_cells import Refused
from benchmarks.common.shapes import Linear, distinct
from benchmarks.cpu.linear.measure import Plan, copies_of, make_spec
from benchmarks.cpu.linear.timing import Call, compare, ratio
from mergequant_vllm.kernels.linear.reference import ReferenceLinear
from mergequant_vllm.kernels.linear.spec import LinearSpec, PreparedLinear, StoredLinear
from mergequant_vllm.kernels.selection.linears import LINEAR_KERNELS

Row = Mapping[str, Any]
Form = Callable[[LinearSpec], LinearSpec]
PLAIN = "plain, W4A4"
SEGMENTS = 4


def _segmented(spec: LinearSpec) -> LinearSpec:
    part = spec.in_features // SEGMENTS // 32 * 32
    lengths = (*[part] * (SEGMENTS - 1), spec.in_features - (SEGMENTS - 1) * part)
    return replace(spec, segments=lengths)


def _token_zero_points(spec: LinearSpec) -> LinearSpec:
    if not spec.dynamic:
        raise Refused("static inputs have no zero points per token")
    return replace(spec, token_zero_points=True)


def _changed(**fields: Any) -> Form:
    return lambda spec: replace(spec, **fields)


FORMS: dict[str, Form] = {
    PLAIN: _changed(),
    f"{SEGMENTS} segments": _segmented,
    "zero points of weights": _changed(zero_points=True),
    "zero points of tokens": _token_zero_points,
    "groups of 128": _changed(group_size=128),
    "groups of 128, zero points": _changed(group_size=128, zero_points=True),
    "groups of 32": _changed(group_size=32),
    "3-bit weights": _changed(weight_bits=3),
    "8-bit inputs": _changed(activation_bits=8),
    "8-bit weights": _changed(weight_bits=8),
    "8-bit weights and inputs": _changed(weight_bits=8, activation_bits=8),
}


def run(plan: Plan, progress: Callable[[Sequence[Row]], None]) -> None:
    """Measure; `progress` is called with all rows so far after each shape."""
    rows: list[Row] = []
    for title, linear in distinct(plan.models):
        rows += measure_forms(plan, title, linear)
        progress(rows)


def measure_forms(plan: Plan, title: str, linear: Linear) -> list[dict[str, Any]]:
    """A row for each M; each form's weights are prepared at the first."""
    subjects = {name: FormedLinear(plan, form, linear) for name, form in FORMS.items()}
    rows = []
    for m in plan.tokens:
        given = {name: partial(subject.calls, m) for name, subject in subjects.items()}

        def check(name: str, result: object) -> None:
            subjects[name].check(result)

        results = compare(given, rounds=plan.rounds, check=check)
        base = {"title": title, "n": linear.n, "k": linear.k, "m": m}
        rows.append({**base, "dynamic": linear.dynamic, "subjects": results})
    return rows


class FormedLinear:
    """A linear in one form: copies of its weights, prepared when they are first asked for."""

    def __init__(self, plan: Plan, form: Form, linear: Linear) -> None:
        self._plan, self._form, self._linear = plan, form, linear
        self._stored: StoredLinear | None = None
        self._copies: list[PreparedLinear] = []
        self._exact = torch.empty(0)

    def calls(self, m: int) -> Sequence[Call]:
        """A call of each copy for M tokens; raises Refused where the form or the kernel cannot."""
        spec = self._form(make_spec(self._linear))
        kernel = LINEAR_KERNELS[self._plan.kernel]
        if (reason := kernel.refusal(spec)) is not None:
            raise Refused(reason)
        generator = torch.Generator().manual_seed(m)
        if self._stored is None:
            self._stored = make_linear(spec, "random", generator, bias=False)
            first = kernel.prepare(self._stored, spec)
            size = sum(tensor.nbytes for tensor in first.buffers())
            more = range(copies_of(self._plan, size) - 1)
            self._copies = [first, *(kernel.prepare(self._stored, spec) for _ in more)]
        codes = make_codes((m, spec.in_features), spec.activation_bits, "random", generator)
        step = make_token_step(m, generator) if spec.dynamic else None
        zero = torch.full((m, 1), 1, dtype=torch.int32) if spec.token_zero_points else None
        reference = ReferenceLinear()
        self._exact = reference.prepare(self._stored, spec)(
            laid_out(codes, reference.layout, spec.in_features), step, zero, False
        )
        given = laid_out(codes, kernel.layout, self._copies[0].columns)
        return [partial(copy, given, step, zero, False) for copy in self._copies]

    def check(self, result: object) -> None:
        """Raise RuntimeError unless a result is the reference's, bit for bit."""
        if not isinstance(result, Tensor) or not torch.equal(result, self._exact):
            raise RuntimeError("its result is not the reference's")


def table(kernel: str, rows: Sequence[Row]) -> str:
    """Times of each form over those of the plain one, in Markdown."""
    head = (
        f"Kernel `{kernel}`: time of a linear's product in each form over the plain one's in the "
        "same round; median over the rounds, then least, median and most over the shapes. Every "
        "result equals the reference's bit for bit. Weights come from memory."
    )
    return "\n\n".join((head, _summary(rows), _by_shape(rows), _refusals(rows)))


def over_plain(row: Row, name: str) -> float | None:
    """How many times the plain form's time a form takes; None if it did not run."""
    plain, other = (row["subjects"].get(key, {}).get("seconds") for key in (PLAIN, name))
    return ratio(plain, other)[0] if plain and other else None


def _summary(rows: Sequence[Row]) -> str:
    lines = ["| M | form | shapes | least | median | most |", "|---" * 6 + "|"]
    for m in dict.fromkeys(row["m"] for row in rows):
        for name in FORMS:
            ratios = [x for row in rows if row["m"] == m and (x := over_plain(row, name))]
            if name != PLAIN and ratios:
                three = (min(ratios), statistics.median(ratios), max(ratios))
                cells = " | ".join(f"{x:.2f}" for x in three)
                lines.append(f"| {m} | {name} | {len(ratios)} | {cells} |")
    return "\n".join(lines)


def _by_shape(rows: Sequence[Row]) -> str:
    lines = [f"| shape | M | {' | '.join(FORMS)} |", "|---" * (len(FORMS) + 2) + "|"]
    for row in rows:
        ratios = (over_plain(row, name) for name in FORMS)
        cells = " | ".join("-" if x is None else f"{x:.2f}" for x in ratios)
        lines.append(f"| {row['title']} {row['n']}x{row['k']} | {row['m']} | {cells} |")
    return "\n".join(lines)


def _refusals(rows: Sequence[Row]) -> str:
    lines = [
        f"- {word.upper()} {name}, {row['title']}: {result[word]}"
        for row in rows
        for name, result in row["subjects"].items()
        for word in ("refused", "failed")
        if word in result
    ]
    return "\n".join(dict.fromkeys(lines))

"""Part `exact`: every kernel against the definition, before anything is timed.

Each cell is one kernel, one format of linear, one size and one dtype; its checks are all numbers
of tokens, static and dynamic, with and without bias, random and extreme codes.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from benchmarks.common.device import Device
from benchmarks.common.random_linears import (
    PATTERNS,
    generator_on,
    laid_out,
    make_codes,
    make_linear,
    make_token_step,
)
from benchmarks.common.result_cells import Cells, Record, Refused
from benchmarks.gpu.context import Context
from benchmarks.gpu.exact import quantizer_checks
from benchmarks.gpu.exact.error_bounds import Product, check
from mergequant_vllm.kernels.linear.reference import ReferenceLinear
from mergequant_vllm.kernels.linear.spec import LinearSpec, StoredLinear
from mergequant_vllm.kernels.selection.linears import LINEAR_KERNELS

TOKENS = (1, 2, 16, 17, 127, 128, 129, 2048)
# (N, K): a model's, off every tile, inside a word, long.
SIZES: tuple[tuple[int, int], ...] = (
    (4096, 4096),
    (129, 352),
    (352, 127),
    (43, 43),
    (4099, 4096),
    (4096, 11008),
    (1024, 129),
)


class Form(NamedTuple):
    """What a linear stores; `segments`: of the first 32 columns and of the rest."""

    weight_bits: int
    activation_bits: int
    group_size: int | None = None
    zero_points: bool = False
    segments: bool = False
    token_zero_points: bool = False


FORMATS = (
    Form(4, 4),
    Form(4, 8),
    Form(3, 4),
    Form(4, 4, 128, zero_points=True),
    Form(4, 4, segments=True, token_zero_points=True),
    Form(4, 4, None, zero_points=True),
    Form(3, 4, 128),
    Form(8, 8),
    Form(8, 4),
    Form(3, 8),
    Form(4, 8, 128, zero_points=True),
    Form(8, 8, 128),
    Form(4, 4, segments=True),
    Form(8, 8, zero_points=True, token_zero_points=True),
)
SMOKE_TOKENS, SMOKE_SIZES, SMOKE_FORMATS = (1, 17), ((43, 43), (48, 128)), FORMATS[:5]


@dataclass(frozen=True)
class Case:
    """One cell: a kernel and a linear; `spec.dynamic` is both in turn."""

    kernel: str
    spec: LinearSpec

    @property
    def key(self) -> str:
        """Name of the cell."""
        s = self.spec
        form = f"W{s.weight_bits}A{s.activation_bits}"
        form += "" if s.group_size is None else f" g{s.group_size}"
        form += "" if s.segments is None else f" segments {'+'.join(map(str, s.segments))}"
        form += " zero points" if s.zero_points else ""
        form += " token zero points" if s.token_zero_points else ""
        dtype = str(s.dtype).removeprefix("torch.")
        return f"{self.kernel} {form} N={s.out_features} K={s.in_features} {dtype}"


def cases(device: Device, *, smoke: bool) -> Iterator[Case]:
    """All cells, the most important first; humming's, which compile for long, last."""
    sizes, formats = (SMOKE_SIZES, SMOKE_FORMATS) if smoke else (SIZES, FORMATS)
    some = sizes[:1] if smoke else (SIZES[1], SIZES[0], SIZES[4])
    dtypes = (torch.bfloat16, torch.float16)
    linears = []
    for number, form in enumerate(formats):
        both = number == 0
        for (n, k), dtype in itertools.product(sizes if both else some, dtypes):
            if dtype is torch.bfloat16 or (not smoke and (both or (n, k) == some[0])):
                linears.append(_spec(device, form, n, k, dtype))
    for late, spec in itertools.product((False, True), linears):
        # The definition on GPUs is checked against int64 on a CPU, which is slow.
        large = device.is_gpu and spec.out_features * spec.in_features > 2**21
        for name in LINEAR_KERNELS:
            if name.startswith("humming") is late and not (large and name == "reference"):
                yield Case(name, spec)


def _spec(device: Device, form: Form, n: int, k: int, dtype: torch.dtype) -> LinearSpec:
    segments = None
    if form.segments:
        segments = (32, k - 32) if k > 32 else (k,)
    return LinearSpec(
        in_features=k,
        out_features=n,
        weight_bits=form.weight_bits,
        activation_bits=form.activation_bits,
        dynamic=form.token_zero_points,
        device=device.kind,
        dtype=dtype,
        group_size=form.group_size,
        zero_points=form.zero_points,
        capability=device.capability,
        segments=segments,
        token_zero_points=form.token_zero_points,
    )


def run(context: Context) -> None:
    """Check every cell that is not done."""
    tokens = SMOKE_TOKENS if context.smoke else TOKENS
    works: dict[str, Callable[[], Record]] = {
        case.key: functools.partial(check_linear, case, tokens, context.device)
        for case in cases(context.device, smoke=context.smoke)
    }
    quantizers = quantizer_checks.plan(context.device, smoke=context.smoke)
    kernels = context.options.get("kernels")
    works = {
        key: work
        for key, work in {**quantizers, **works}.items()
        if kernels is None or key.split()[0] in kernels
    }
    for key in context.cells.pending(works):
        context.measure(key, works[key])


def check_linear(case: Case, tokens: tuple[int, ...], device: Device) -> Record:
    """All checks of one cell.

    Raises:
        Refused: the kernel does not take the linear.
    """
    checks, differing, first = 0, 0, None
    refusal = None
    kinds = (True,) if case.spec.token_zero_points else (False, True)
    for dynamic, pattern in itertools.product(kinds, PATTERNS):
        spec = replace(case.spec, dynamic=dynamic)
        refusal = LINEAR_KERNELS[case.kernel].refusal(spec)
        if refusal is not None:
            continue
        trial = Trial(
            case.kernel, spec, make_linear(spec, pattern, generator_on(device, 1), bias=True)
        )
        # Extreme codes at two sizes of the batch are enough.
        counts = tokens if pattern == "random" else tokens[1:3]
        for count, add_bias in itertools.product(counts, (False, True)):
            fault = trial.check(pattern, count, add_bias)
            checks += 1
            if fault is not None:
                differing += 1
                kind = "per token" if dynamic else "static"
                bias = "bias" if add_bias else "no bias"
                first = first or f"{count} tokens, {kind}, {bias}, {pattern} codes: {fault}"
    if not checks:
        raise Refused(refusal or "it refuses")
    return {"checks": checks, "differing": differing, "first": first}


class Trial:
    """One linear, prepared by a kernel and by the definition."""

    def __init__(self, kernel: str, spec: LinearSpec, stored: StoredLinear) -> None:
        self.kernel, self.spec, self.stored = kernel, spec, stored
        self.product = LINEAR_KERNELS[kernel].prepare(stored, spec)
        # On GPUs the definition sums in float64; that form is itself checked against int64.
        self.to_cpu = kernel == "reference" and spec.device == "cuda"
        self.definition = ReferenceLinear().prepare(stored, spec)
        if self.to_cpu:
            self.definition = self.definition.cpu()
            self.product = ReferenceLinear().prepare(stored, spec)

    def check(self, pattern: str, tokens: int, add_bias: bool) -> str | None:
        """One call; None or the first difference."""
        spec = self.spec
        generator = torch.Generator(device=spec.device).manual_seed(tokens)
        codes = make_codes((tokens, spec.in_features), spec.activation_bits, pattern, generator)
        token_step = make_token_step(tokens, generator) if spec.dynamic else None
        given = laid_out(codes, LINEAR_KERNELS[self.kernel].layout, self.product.columns)
        token_zero = None
        if spec.token_zero_points:
            zeros = make_codes((tokens, 1), spec.activation_bits, pattern, generator)
            token_zero = zeros.to(torch.int32)
        result = self.product(given, token_step, token_zero, add_bias)
        if self.to_cpu:
            codes, result = codes[:4].cpu(), result[:4].cpu()
            token_step = None if token_step is None else token_step[:4].cpu()
            token_zero = None if token_zero is None else token_zero[:4].cpu()
        expected = self.definition(codes, token_step, token_zero, add_bias)
        return check(
            self.kernel,
            Product(spec, self.stored, codes, token_step, add_bias, expected, result),
        )


def table(cells: Cells) -> str:
    """Markdown: counts a kernel, then every cell that differs, failed or was refused."""
    rows: dict[str, list[Record]] = {}
    for key, cell in cells.done.items():
        rows.setdefault(key.split()[0], []).append(cell)
    lines = ["| kernel | cells equal | checks | cells that differ | failed | refused |"]
    lines += ["|---|---|---|---|---|---|"]
    for kernel, kernel_cells in rows.items():
        measured = [cell for cell in kernel_cells if "checks" in cell]
        differing = sum(bool(cell["differing"]) for cell in measured)
        counts = (
            len(measured) - differing,
            sum(cell["checks"] for cell in measured),
            differing,
            sum("failed" in cell for cell in kernel_cells),
            sum("refused" in cell for cell in kernel_cells),
        )
        lines.append(f"| {kernel} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join([*lines, "", *faults(cells), "", *refusals(cells)])


def faults(cells: Cells) -> list[str]:
    """A line for each cell that differs or failed."""
    lines = []
    for key, cell in cells.done.items():
        if "failed" in cell:
            lines.append(f"- FAILED {key}: {cell['failed']}")
        elif cell.get("differing"):
            lines.append(
                f"- DIFFERS {key}: {cell['differing']} of {cell['checks']} checks, "
                f"first {cell['first']}"
            )
    return lines or ["Nothing differs and nothing failed."]


def refusals(cells: Cells) -> list[str]:
    """A line for each reason that kernels gave, with the number of cells."""
    reasons: dict[tuple[str, str], int] = {}
    for key, cell in cells.done.items():
        if "refused" in cell:
            reason = (key.split()[0], cell["refused"])
            reasons[reason] = reasons.get(reason, 0) + 1
    return [f"- {name} refused {count} cells: {why}" for (name, why), count in reasons.items()]


def passed(cells: Cells) -> bool:
    """Whether nothing differs and nothing failed."""
    return not any(
        cells.is_current(key) and ("failed" in cell or cell.get("differing"))
        for key, cell in cells.done.items()
    )


def summary(cells: Cells) -> str:
    """Summary to print: how much was checked, and the first cell that is wrong."""
    checks = sum(cell.get("checks", 0) for cell in cells.done.values())
    first_lines = faults(cells)
    return f"{checks} checks in {len(cells.done)} cells; {first_lines[0]}"

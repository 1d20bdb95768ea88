"""The values a weight can be rounded to: 3, 4 or 8 bits (paper 5, Table 5), from the weight alone.

A group is the run of columns g that share a step and a zero point: all of an output channel,
`group_size` consecutive ones, or a segment of a given length. With codes q of b bits in
-2^(b-1) .. 2^(b-1) - 1,

    W_jk = step_jg * (q_jk - zero_jg)       symmetric: zero = 0

A code is always round(W / step + zero), half to even. Steps are rounded to what the checkpoint
stores before a zero point or a code is computed from them, so that both fit the step that the
server multiplies by.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mergequant_vllm.format import WeightForm
from mergequant_vllm.kernels.linear.spans import span_slices
from mergequant_vllm.rounding import (
    largest_code,
    round_to_16_bit,
    round_to_codes,
    smallest_code,
)

_SMALLEST_STEP = 2.0**-24  # smallest positive float16
_LOWEST_RATIO, _RATIOS = 0.2, 81  # a ratio each hundredth
_APART = 3  # hundredths between the ratios of the first look
_LOOKED_AT = 3  # ratios between two looks at which rows have seen their best
_SURELY = 1.05  # steps are rounded: a range that shrinks by a hundredth may grow by 2^-8 of itself
_ELEMENTS_AT_ONCE = 2**18  # of the weight, in a search: its temporaries stay within a cache


Search = Literal["minmax", "mse"]


@dataclass(frozen=True)
class WeightGrid:
    """Steps and zero points of one weight [out, K].

    Attributes:
        step: [out, groups], in the weight's dtype, positive; bfloat16 and float16 hold it exactly.
        zero_points: int8 [out, groups], the code of a weight of 0; None if all are 0.
        bits: width of a code.
        runs: lengths of the runs of columns that share a step, the groups, in order.
    """

    step: Tensor
    zero_points: Tensor | None
    bits: int
    runs: tuple[int, ...]

    def columns(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Step and zero point of the columns `numbers`, int64 [m]: each [out, m], step's dtype."""
        size = (self.step.shape[0], len(numbers))
        step, zero = self.step, self.zero_points
        if len(self.runs) > 1:
            ends = torch.tensor(self.runs, device=numbers.device).cumsum(0)
            groups = torch.searchsorted(ends, numbers, right=True)
            step = step[:, groups]
            zero = None if zero is None else zero[:, groups]
        zero = step.new_zeros(1, 1) if zero is None else zero.to(step.dtype)
        return step.expand(size), zero.expand(size)

    def round_weight(self, weight: Tensor) -> Tensor:
        """Nearest codes of a weight [out, K]: int8 [out, K]."""
        step, zero = self.columns(torch.arange(weight.shape[1], device=weight.device))
        return round_to_codes(weight / step + zero, self.bits).to(torch.int8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The weight that codes [out, K] stand for: [out, K], in the step's dtype."""
        step, zero = self.columns(torch.arange(codes.shape[1], device=codes.device))
        return (codes.to(step.dtype) - zero) * step


def weight_grid(weight: Tensor, form: WeightForm, search: Search = "minmax") -> WeightGrid:
    """Choose the steps and zero points of a weight.

    Args:
        weight: float32 or float64 [out, K], migrated. Columns of zeros (padding) change nothing.
        form: how the weight is stored.
        search: `minmax`: the codes span a group's weights (the paper's choice, appendix B); `mse`:
            the range is shrunk by the ratio that leaves the least squared error.

    Returns:
        WeightGrid. Symmetric: step = max|W| / (2^(b-1) - 1). Asymmetric: the range of the weights
        and 0, over 2^b - 1 steps. A group of zeros has step 1, and its codes equal its zero point.
    """
    runs = runs_of(form, weight.shape[1])
    if form.segments is None:
        step, zero = _fit_groups(_grouped(weight, runs[0]), form, search)
    else:
        parts = [
            _fit_groups(x[:, None], form, search) for x in torch.split(weight, list(runs), dim=1)
        ]
        step = torch.cat([step for step, _ in parts], dim=1)
        zeros = [zero for _, zero in parts if zero is not None]
        zero = torch.cat(zeros, dim=1) if zeros else None
    zero_points = None if zero is None else zero.to(torch.int8)
    return WeightGrid(step, zero_points, form.bits, runs)


def runs_of(form: WeightForm, columns: int) -> tuple[int, ...]:
    """Lengths of the runs of columns that share a step; they add up to `columns`."""
    spans = span_slices(columns, form.group_size, form.segments)
    return (columns,) if spans is None else tuple(span.stop - span.start for span in spans)


def _fit_groups(grouped: Tensor, form: WeightForm, search: Search) -> tuple[Tensor, Tensor | None]:
    """Step and zero point of groups [out, groups, size]: each [out, groups]."""
    low = grouped.amin(dim=2).clamp(max=0.0)
    high = grouped.amax(dim=2).clamp(min=0.0)
    if search == "mse":
        ratio = _search(grouped, low, high, form)
        low, high = low * ratio, high * ratio
    return _fit(low, high, form)


def largest_weight(bits: int) -> float:
    """Magnitude up to which a weight can be stored: the largest 16-bit step's largest code."""
    return float(round_to_16_bit(torch.tensor(torch.inf))) * largest_code(bits)


def _grouped(weight: Tensor, size: int) -> Tensor:
    """[out, K] to [out, groups, size]; zeros, which no range or error notices, fill the last."""
    padded: Tensor = functional.pad(weight, (0, -weight.shape[1] % size))
    return padded.reshape(weight.shape[0], -1, size)


def _fit(low: Tensor, high: Tensor, form: WeightForm) -> tuple[Tensor, Tensor | None]:
    """Step and, if asymmetric, zero point of ranges [out, groups] that contain 0."""
    if not form.zero_points:
        return _stored_step(torch.maximum(high, -low), largest_code(form.bits)), None
    step = _stored_step(high - low, 2**form.bits - 1)
    return step, round_to_codes(smallest_code(form.bits) - low / step, form.bits)


def _stored_step(extent: Tensor, steps: int) -> Tensor:
    step = round_to_16_bit(extent / steps).clamp(min=_SMALLEST_STEP)
    return torch.where(extent == 0, 1.0, step)


def _search(grouped: Tensor, low: Tensor, high: Tensor, form: WeightForm) -> Tensor:
    """Ratio of least error of each group: [out, groups], in `low`'s dtype.

    Ratios are compared in float32, 4 times faster than float64 on a CPU, and the winner once more
    with 1 in the weight's own dtype: no group is worse off than with `minmax`.
    """
    ratios = []
    rows = max(1, _ELEMENTS_AT_ONCE // grouped[0].numel())
    for start in range(0, len(grouped), rows):
        w, a, b = (x[start : start + rows] for x in (grouped, low, high))
        ratio = _best_ratio(w.float(), a.float(), b.float(), form).to(w.dtype)
        better = _error(w, a * ratio, b * ratio, form) < _error(w, a, b, form)
        ratios.append(torch.where(better, ratio, 1.0))
    return torch.cat(ratios)


def _best_ratio(grouped: Tensor, low: Tensor, high: Tensor, form: WeightForm) -> Tensor:
    """Ratio of least error of each group: one of every `_APART` first, then those beside it."""
    ratios = torch.linspace(1.0, _LOWEST_RATIO, _RATIOS, dtype=low.dtype, device=low.device)
    best = torch.zeros_like(low, dtype=torch.int64)  # its place among `ratios`
    least = _error(grouped, low, high, form)
    every, rows = (grouped, low, high), torch.arange(len(low), device=low.device)
    for look, number in enumerate(range(_APART, _RATIOS, _APART), start=1):
        if look % _LOOKED_AT == 0:
            # What a range cuts off only grows as it shrinks: such rows have seen their best.
            cut = _cut_off(grouped, low * ratios[number], high * ratios[number], form)
            left = ~(cut > _SURELY * least[rows]).all(dim=1)
            rows, grouped, low, high = rows[left], grouped[left], low[left], high[left]
            if len(rows) == 0:
                break
        error = _error(grouped, low * ratios[number], high * ratios[number], form)
        better = error < least[rows]
        best[rows] = torch.where(better, number, best[rows])
        least[rows] = torch.where(better, error, least[rows])
    grouped, low, high = every
    coarse = best
    for aside in range(1 - _APART, _APART):
        if aside != 0:
            beside = (coarse + aside).clamp(0, _RATIOS - 1)
            error = _error(grouped, low * ratios[beside], high * ratios[beside], form)
            best = torch.where(error < least, beside, best)
            least = torch.minimum(error, least)
    return ratios[best]


def _cut_off(grouped: Tensor, low: Tensor, high: Tensor, form: WeightForm) -> Tensor:
    """The part of `_error` that lies beyond the first and the last code: [out, groups]."""
    step, zero = _fit(low, high, form)
    offset = torch.zeros_like(step) if zero is None else zero
    top = (largest_code(form.bits) - offset) * step
    bottom = (smallest_code(form.bits) - offset) * step
    beyond = grouped - grouped.clamp(bottom[:, :, None], top[:, :, None])
    return beyond.square_().sum(dim=2)


def _error(grouped: Tensor, low: Tensor, high: Tensor, form: WeightForm) -> Tensor:
    """Squared error summed over each group: [out, groups, size] to [out, groups]."""
    step, zero = _fit(low, high, form)
    scaled = grouped / step[:, :, None]
    if zero is not None:
        scaled.add_(zero[:, :, None])
    error = round_to_codes(scaled, form.bits).sub_(scaled).mul_(step[:, :, None])
    return error.square_().sum(dim=2)

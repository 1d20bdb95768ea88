"""Part `linear`: our kernel and others on the linears of real models, product against product.

Activations are codes already and results are float32, as in a float32 model. Quantizing each token
(with and without the online rotation) is timed beside it where the model does it. Weights are
cycled through copies that together have four times the size of the cache, so that they come from
memory, as those of a whole model do.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.random_linears import make_codes
from benchmarks.common.result_cells import Refused
from benchmarks.common.shapes import Linear, distinct
from benchmarks.cpu.linear.baselines import BASELINES, Baseline
from benchmarks.cpu.linear.limits import CACHES, Limits, measure_limits
from benchmarks.cpu.linear.timing import Call, compare
from benchmarks.cpu.machine import cache_bytes
from mergequant_vllm.kernels.codes import lay_out
from mergequant_vllm.kernels.linear.spec import LinearSpec, PreparedLinear, StoredLinear
from mergequant_vllm.kernels.selection.linears import LINEAR_KERNELS
from mergequant_vllm.kernels.selection.quantizers import CodeForm, TokenQuantizer, writer_for
from mergequant_vllm.packing import pack

TOKENS = (1, 8, 512)
OURS = "mergequant int4"
QUANTIZE, ROTATE = "quantizing each token", "rotating and quantizing each token"
BITS = 4
LARGEST_BLOCK = 256  # of the rotation; R4 in blocks that ranks do not cut
MOST_COPIES = 2048


@dataclass(frozen=True)
class Plan:
    """Plan of a run of this part.

    Attributes:
        kernel: name of ours.
        models: of `benchmarks.common.shapes`.
        tokens: M of each call.
        rounds: of `timing.compare`.
        copied_bytes: what the copies of one subject's weights have at least.
    """

    kernel: str
    models: tuple[str, ...]
    tokens: tuple[int, ...]
    rounds: int
    copied_bytes: int


Progress = Callable[[Limits, Sequence[Mapping[str, Any]]], None]


def run(plan: Plan, isa: str, progress: Progress) -> None:
    """Measure; `progress` is called with all rows so far after each shape."""
    limits = measure_limits(isa, cache_bytes())
    rows: list[Mapping[str, Any]] = []
    for title, linear in distinct(plan.models):
        rows += measure_shape(plan, title, linear)
        progress(limits, rows)


def measure_shape(plan: Plan, title: str, linear: Linear) -> list[dict[str, Any]]:
    """A row for each M."""
    subjects = Subjects(plan, linear)
    rows = []
    for m in plan.tokens:
        codes = make_codes((m, linear.k), BITS, "random", subjects.generator)
        exact = F.linear(codes.to(torch.float32), subjects.weight.to(torch.float32))
        given, check = subjects.for_tokens(codes), partial(check_product, exact=exact)
        results = compare(given, rounds=plan.rounds, check=check)
        base = {"title": title, "n": linear.n, "k": linear.k, "m": m, "dynamic": linear.dynamic}
        rows.append({**base, "packed_bytes": subjects.packed_bytes, "subjects": results})
    return rows


class Subjects:
    """All that runs one linear; weights are prepared at the first call and kept for every M."""

    def __init__(self, plan: Plan, linear: Linear) -> None:
        self.plan, self.linear = plan, linear
        self.generator = torch.Generator().manual_seed(0)
        self.weight = make_codes((linear.n, linear.k), BITS, "random", self.generator)
        self.spec = make_spec(linear)
        self.packed_bytes = 0
        self._ours: list[PreparedLinear] = []
        self._baselines: dict[str, list[Callable[[Tensor], Tensor]]] = {}

    def for_tokens(self, codes: Tensor) -> dict[str, Callable[[], Sequence[Call]]]:
        """Functions that make each subject's calls for activation codes int8 [M, K]."""
        subjects: dict[str, Callable[[], Sequence[Call]]] = {OURS: partial(self._our_calls, codes)}
        for name, baseline in BASELINES.items():
            subjects[name] = partial(self._baseline_calls, name, baseline, codes)
        if self.linear.dynamic:
            x = torch.randn(codes.shape, generator=self.generator)
            subjects[QUANTIZE] = partial(self._quantizer_calls, x, None)
            subjects[ROTATE] = partial(self._quantizer_calls, x, rotation_block(self.linear.k))
        return subjects

    def _our_calls(self, codes: Tensor) -> Sequence[Call]:
        kernel = LINEAR_KERNELS[self.plan.kernel]
        reason = kernel.refusal(self.spec)
        if reason is not None:
            raise Refused(reason)
        if not self._ours:
            stored = StoredLinear(pack(self.weight, BITS), torch.ones(self.linear.n, 1))
            first = kernel.prepare(stored, self.spec)
            self.packed_bytes = sum(tensor.nbytes for tensor in first.buffers())
            more = range(copies_of(self.plan, self.packed_bytes) - 1)
            # Each copy is packed anew: `deepcopy` would take its weights out of huge pages.
            self._ours = [first, *(kernel.prepare(stored, self.spec) for _ in more)]
        given = lay_out(codes, kernel.layout, self._ours[0].columns).contiguous()
        step = torch.ones(len(codes), 1) if self.spec.dynamic else None
        return [partial(one, given, step, None, False) for one in self._ours]

    def _baseline_calls(self, name: str, baseline: Baseline, codes: Tensor) -> Sequence[Call]:
        if name not in self._baselines:
            size = self.weight.numel() * baseline.weight_bits // 8
            made = [baseline.make(self.weight) for _ in range(copies_of(self.plan, size))]
            self._baselines[name] = made
        given = baseline.inputs(codes)
        return [partial(one, given) for one in self._baselines[name]]

    def _quantizer_calls(self, x: Tensor, hadamard: int | None) -> Sequence[Call]:
        kernel = LINEAR_KERNELS[self.plan.kernel]
        form = CodeForm(
            bits=BITS,
            layout=kernel.layout,
            columns=self.linear.k,
            writer=writer_for(self.spec, kernel),
        )
        quantizer = TokenQuantizer(form, torch.tensor([0.9]), hadamard)
        return [partial(quantizer, x)]


def copies_of(plan: Plan, size: int) -> int:
    """How many copies of weights of `size` bytes do not fit the cache."""
    return max(1, min(MOST_COPIES, math.ceil(plan.copied_bytes / max(size, 1))))


def make_spec(linear: Linear) -> LinearSpec:
    """The linear as a float32 server has it: W4A4, per channel."""
    return LinearSpec(
        in_features=linear.k,
        out_features=linear.n,
        weight_bits=BITS,
        activation_bits=BITS,
        dynamic=linear.dynamic,
        device="cpu",
        dtype=torch.float32,
    )


def rotation_block(k: int) -> int:
    """The largest power of two that divides K, up to `LARGEST_BLOCK`."""
    return min(LARGEST_BLOCK, k & -k)


def check_product(name: str, result: object, exact: Tensor) -> None:
    """Raise RuntimeError if a result [M, N] is further from the exact one than it may be.

    Steps are 1, so that a result is a sum of products of codes, exact in float32 below 2^24.
    """
    if name in (QUANTIZE, ROTATE):
        return
    close = BASELINES[name].close if name in BASELINES else 0.0
    if not isinstance(result, Tensor) or result.shape != exact.shape:
        raise RuntimeError("it returned something else than [M, N]")
    error = (result.to(torch.float64) - exact).abs().max()
    if not error <= close * exact.abs().max():
        raise RuntimeError(f"its result is wrong by {float(error):g}")


def plan_of(options: Any) -> Plan:
    """From the command line."""
    return Plan(
        kernel=options.kernel,
        models=tuple(options.models),
        tokens=tuple(options.tokens),
        rounds=options.rounds,
        copied_bytes=CACHES * cache_bytes(),
    )

"""Training of a block's compensation through its quantizers (paper 4.3)."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergequant.layers.in_block import replace_by_simulated
from mergequant.methods.trained_weight import (
    ElementwiseWeight,
    LowRankWeight,
    TrainedWeight,
    straight_through,
)
from mergequant.model.block import Block
from mergequant.quantizer.inputs.record import CalibratedInput
from mergequant.quantizer.plan import TrainingPlan
from mergequant.quantizer.result import LinearResult

logger = logging.getLogger("mergequant")

TOKENS_A_STEP = 512
_HELD_OUT = 8  # one window in so many, at least one
_TOKEN_FLOOR = 1e-6  # of the mean square: a token of zeros has no relative error
_PATIENCE = 3  # epochs without a better held-out loss, after which training stops


@dataclass(frozen=True)
class Compensation:
    """What became of a block's training.

    Attributes:
        codes: int8 [out, K] of each linear, by name within the block; empty if training did not
            lower the held-out loss.
        before: loss on held-out windows of the block as it was: squared error of its output over
            that of its input, both of each token relative to the square of the token's target.
        after: the same with `codes`.
        epochs: passes over the windows that were made.
    """

    before: float
    after: float
    epochs: int
    codes: dict[str, Tensor] = field(default_factory=dict)


def compensate(
    block: Block,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    results: Sequence[LinearResult],
    plan: TrainingPlan,
    epoch_done: Callable[[float], None] = lambda _: None,
) -> Compensation:
    """Train D of all linears of a block to bring its output to the full-precision block's.

    The block's linears are left as trainable ones: put in those of the checkpoint afterwards.

    Args:
        inputs: [windows, length, n] each, what the quantized blocks before this one emit.
        targets: the same of what the full-precision model emits behind this block.
        epoch_done: called with the lowest held-out loss after each epoch.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    weights = dict(_trainable(block, results, plan, generator))
    training, held_out = _split(inputs, targets)
    loss_of = RelativeError.over(inputs, targets)
    parameters = [x for weight in weights.values() for x in weight.parameters()]
    before = best = _loss(block, held_out, loss_of)
    if not training:
        logger.warning("One calibration window cannot be held out: no compensation is trained")
        return Compensation(before, before, 0)
    kept, epochs, better_at = _copies(parameters), 0, 0
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=0.0)
    steps = plan.epochs * len(training)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    while epochs < plan.epochs and epochs - better_at < _PATIENCE:
        for number in torch.randperm(len(training), generator=generator).tolist():
            optimizer.zero_grad()
            loss = loss_of(block, *training[number]).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            decay.step()
        epochs += 1
        loss_now = _loss(block, held_out, loss_of)
        if loss_now < best:
            best, better_at, kept = loss_now, epochs, _copies(parameters)
        epoch_done(best)
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    codes = {name: weight.codes() for name, weight in weights.items()} if better_at else {}
    return Compensation(before, best, epochs, codes)


def _trainable(
    block: Block,
    results: Sequence[LinearResult],
    plan: TrainingPlan,
    generator: torch.Generator,
) -> Iterator[tuple[str, TrainedWeight]]:
    """Put trainable linears into the block; yields their weights by name."""
    inputs = {id(x.source): _SharedInput(x.source) for x in results}
    for result in results:
        rounding = result.rounding
        assert rounding is not None and rounding.working is not None
        assert rounding.trainable is not None
        parts = (rounding.working, rounding.trainable, rounding.grid)
        weight: TrainedWeight = ElementwiseWeight(*parts)
        if plan.rank is not None:
            rank = min(plan.rank, *rounding.codes.shape)
            weight = LowRankWeight(*parts, rank, generator)
        replace_by_simulated(
            block, result.name, inputs[id(result.source)], weight, result.output_offset
        )
        yield result.name, weight


class _SharedInput:
    """Reads an input once for all linears that share it, which are handed the same tensor."""

    def __init__(self, source: CalibratedInput) -> None:
        self._source = source
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x:
            exact = self._source.dequantized(x.detach())
            self._last = x, straight_through(exact, self._source.relaxed(x))
        return self._last[1]


Pairs = list[tuple[Tensor, Tensor]]


def _split(inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[Pairs, Pairs]:
    """Steps of about `TOKENS_A_STEP` tokens to train on, and to hold out: the last windows."""
    windows = sum(len(x) for x in inputs)
    left = windows - max(1, windows // _HELD_OUT)
    training: Pairs = []
    held_out: Pairs = []
    for x, y in zip(inputs, targets, strict=True):
        here = min(max(left, 0), len(x))
        left -= len(x)
        size = max(1, TOKENS_A_STEP // x.shape[1])
        if here:
            training += zip(torch.split(x[:here], size), torch.split(y[:here], size), strict=True)
        if here < len(x):
            held_out += zip(torch.split(x[here:], size), torch.split(y[here:], size), strict=True)
    return training, held_out


@dataclass(frozen=True)
class RelativeError:
    """Squared error of a block's output, each token's relative to the square of its target.

    What reads the residual stream divides each token by its norm. Without this a few massive
    tokens, hundreds of times as long as others (Sun et al., 2024), own nearly all of the error.

    Attributes:
        floor: least square of a target, for tokens that are 0.
        scale: mean over tokens of the relative square of what the target is beyond the input.
    """

    floor: float
    scale: float

    @classmethod
    def over(cls, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> "RelativeError":
        """The loss in units of that of a block that adds nothing.

        Args:
            inputs: as `compensate` takes them.
            targets: likewise.
        """
        tokens = sum(x[..., 0].numel() for x in inputs)
        squares = sum(float(y.square().sum(dtype=torch.float64)) for y in targets)
        floor = max(_TOKEN_FLOOR * squares / tokens, 1e-30)
        pairs = zip(inputs, targets, strict=True)
        added = sum(
            float(((y - x).square().sum(-1) / _squares(y, floor)).sum(dtype=torch.float64))
            for x, y in pairs
        )
        return cls(floor, max(added / tokens, 1e-30))

    def __call__(self, block: Block, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each token: [windows, length]."""
        error = block.forward(x, gradient=torch.is_grad_enabled()) - y
        return error.square().sum(-1) / _squares(y, self.floor) / self.scale


def _squares(y: Tensor, floor: float) -> Tensor:
    """Square of each token of y [..., n], at least `floor`: [...]."""
    return y.square().sum(-1).clamp(min=floor)


def _loss(block: Block, pairs: Pairs, loss_of: RelativeError) -> float:
    with torch.no_grad():
        total = sum(float(loss_of(block, x, y).sum(dtype=torch.float64)) for x, y in pairs)
    return total / sum(x[..., 0].numel() for x, _ in pairs)


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]

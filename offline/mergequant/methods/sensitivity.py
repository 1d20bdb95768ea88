"""What rounding costs the model's loss, and which linears to give more bits.

To second order, a rounding error e of something with which the loss has the gradient g adds about
half of (g e)^2 to it: the empirical Fisher information takes the place of the second derivative
(Optimal Brain Damage, LeCun et al., 1990; OBQ, Frantar and Alistarh, 2022). Errors of different
channels and tokens are taken to be independent, as rounding errors nearly are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FEW, MANY = 4, 8  # bits before and after an upgrade
_FINER = ((2**FEW - 1) / (2**MANY - 1)) ** 2  # what of a squared error is left


def input_damage(error: Tensor, gradient: Tensor) -> float:
    """Loss that rounding an input adds.

    Args:
        error: [tokens, n], of the input.
        gradient: [tokens, n], of the summed loss with respect to the input.
    """
    return 0.5 * float((error * gradient).square().sum(dtype=torch.float64))


def weight_damage(x: Tensor, error: Tensor, gradient: Tensor) -> float:
    """Loss that rounding a weight adds.

    Args:
        x: [tokens, n], the linear's input.
        error: [out, n], of the weight.
        gradient: [tokens, out], of the summed loss with respect to the output.
    """
    return 0.5 * float(((x @ error.T) * gradient).square().sum(dtype=torch.float64))


@dataclass(frozen=True)
class Sensitivity:
    """Linears that read one input, and what their rounding costs.

    Attributes:
        linears: full names.
        static: the input has static steps.
        multiplications: a token.
        activation_bits: width of the input's codes.
        weight_bits: width of the weights' codes.
        input_damage: nats a token, with those bits.
        weight_damage: likewise.
        fixed: the widths are not to be changed.
    """

    linears: tuple[str, ...]
    static: bool
    multiplications: int
    activation_bits: int
    weight_bits: int
    input_damage: float
    weight_damage: float
    fixed: bool = False

    @property
    def bits(self) -> float:
        """Mean width of what is multiplied."""
        return (self.activation_bits + self.weight_bits) / 2

    @property
    def damage(self) -> float:
        """Nats a token."""
        return self.input_damage + self.weight_damage

    def upgrade(self) -> "Sensitivity | None":
        """The same with a wider input or, where that is wide already, wider weights."""
        if self.fixed:
            return None
        if self.activation_bits == FEW:
            return replace(self, activation_bits=MANY, input_damage=self.input_damage * _FINER)
        if self.weight_bits == FEW:
            return replace(self, weight_bits=MANY, weight_damage=self.weight_damage * _FINER)
        return None


def average_bits(linears: Sequence[Sensitivity]) -> float:
    """Mean width of weights and inputs over all multiplications."""
    total = sum(x.multiplications for x in linears)
    return sum(x.bits * x.multiplications for x in linears) / total if total else 0.0


def upgraded(
    linears: Sequence[Sensitivity], most_bits: float | None, most_damage: float | None
) -> list[Sensitivity]:
    """Widths of least damage: each time, the upgrade that saves most for its bits.

    Args:
        linears: as they are to begin with.
        most_bits: bound on `average_bits`; an upgrade that exceeds it is passed over.
        most_damage: once the whole damage is within it, nothing more is upgraded.
    """
    chosen = list(linears)
    budget = None
    if most_bits is not None:
        total = sum(x.multiplications for x in linears)
        budget = (most_bits - average_bits(linears)) * total
    while most_damage is None or sum(x.damage for x in chosen) > most_damage:
        best = max(_offers(chosen, budget), default=None, key=lambda offer: offer[:3])
        if best is None:
            break
        _, cost, index, wider = best
        chosen[index] = wider
        budget = None if budget is None else budget - cost
    return chosen


def _offers(
    chosen: Sequence[Sensitivity], budget: float | None
) -> Iterator[tuple[float, float, int, Sensitivity]]:
    """Upgrades within the budget: damage saved for a bit, bits, which, and what it becomes."""
    for index, now in enumerate(chosen):
        wider = now.upgrade()
        if wider is None:
            continue
        cost = (wider.bits - now.bits) * now.multiplications
        if budget is None or cost <= budget * (1 + 1e-9):
            yield (now.damage - wider.damage) / cost, cost, index, wider

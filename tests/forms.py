"""Forms of a linear, spelled flat: what several tests make of the contract's nested records."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mergequant.methods.weights import Search, WeightGrid, weight_grid
from mergequant_vllm.format import DynamicInput, LinearFormat, StaticInput, WeightForm

_WEIGHT = {"weight_bits": "bits", "group_size": "group_size", "segments": "segments"}
_WEIGHT |= {"zero_points": "zero_points"}
_STATIC = {"activation_bits": "bits", "columns": "columns", "offsets": "offsets"}
_STATIC |= {"input_zero_points": "zero_points"}
_DYNAMIC = {"activation_bits": "bits", "hadamard": "hadamard", "heads": "heads"}
_DYNAMIC |= {"input_zero_points": "zero_points"}


def linear_form(shape: tuple[int, int], activations: str, **fields: Any) -> LinearFormat:
    """A linear's format from fields such as `weight_bits`, `columns`, `hadamard` and `bias`."""

    def take(names: dict[str, str]) -> dict[str, Any]:
        return {inner: fields.pop(outer) for outer, inner in names.items() if outer in fields}

    weight = WeightForm(**take(_WEIGHT))
    if activations == "static":
        norm = fields.pop("norm", "n")
        source: StaticInput | DynamicInput = StaticInput(**take(_STATIC))
    else:
        norm = fields.pop("norm", None)
        source = DynamicInput(**take(_DYNAMIC))
    bias, offset = fields.pop("bias", False), fields.pop("output_offset", None)
    assert not fields, f"unknown fields {sorted(fields)}"
    return LinearFormat(shape, bias, norm, weight, source, offset)


@dataclass(frozen=True)
class Form:
    """How a test has a weight rounded; group sizes that no checkpoint has are possible."""

    bits: int = 4
    group_size: int | None = None
    asymmetric: bool = False
    search: Search = "minmax"
    segments: tuple[int, ...] | None = None


def make_grid(weight: Tensor, form: Form) -> WeightGrid:
    """The steps and zero points of a weight [out, K]."""
    stored = WeightForm.model_construct(
        bits=form.bits,
        group_size=form.group_size,
        segments=form.segments,
        zero_points=form.asymmetric,
    )
    return weight_grid(weight, stored, form.search)

"""What calibration says of a model's channels, for the transforms that go into its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_ORDER, _SCALE, _OUTLIERS = "order", "scale.", "outliers."


@dataclass(frozen=True, eq=False)
class Channels:
    """Statistics of channels, on the CPU; nothing by default.

    Attributes:
        order: int64 [n], the residual's channels by falling variance; None: R1 mixes them all.
        scales: float32 [K] by full name of a linear: what its input is divided by, and its weight's
            columns multiplied.
        outliers: by full name of a linear behind a norm, the `outlier_ratio` of what it reads in
            the source model.
    """

    order: Tensor | None = None
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    outliers: Mapping[str, float] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name, to be kept in a file."""
        kept = {f"{_SCALE}{name}": scale for name, scale in self.scales.items()}
        for name, ratio in self.outliers.items():
            kept[f"{_OUTLIERS}{name}"] = torch.tensor(ratio, dtype=torch.float64)
        return kept if self.order is None else {**kept, _ORDER: self.order}

    @classmethod
    def of_tensors(cls, kept: Mapping[str, Tensor]) -> "Channels":
        """What `tensors` gave."""
        outliers = {name: float(x) for name, x in _below(kept, _OUTLIERS).items()}
        return cls(kept.get(_ORDER), _below(kept, _SCALE), outliers)


def _below(kept: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What has names that begin so, by the rest of them."""
    return {x.removeprefix(prefix): kept[x] for x in kept if x.startswith(prefix)}

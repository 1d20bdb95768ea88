"""What calibration says of a model's channels, for the transforms that go into its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

_ORDER, _SCALE = "order", "scale."


@dataclass(frozen=True, eq=False)
class Channels:
    """Statistics of channels, on the CPU; nothing by default.

    Attributes:
        order: int64 [n], the residual's channels by falling variance; None: R1 mixes them all.
        scales: float32 [K] by full name of a linear: what its input is divided by, and its weight's
            columns multiplied.
    """

    order: Tensor | None = None
    scales: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name, to be kept in a file."""
        kept = {f"{_SCALE}{name}": scale for name, scale in self.scales.items()}
        return kept if self.order is None else {**kept, _ORDER: self.order}

    @classmethod
    def of_tensors(cls, kept: Mapping[str, Tensor]) -> "Channels":
        """What `tensors` gave."""
        scales = {
            name.removeprefix(_SCALE): x for name, x in kept.items() if name.startswith(_SCALE)
        }
        return cls(kept.get(_ORDER), scales)

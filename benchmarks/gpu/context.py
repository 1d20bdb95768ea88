"""What a part is given: the device, its cells, its options."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.device import Device, synchronize
from benchmarks.common.result_cells import Cells, Record


@dataclass(frozen=True)
class Context:
    """One run of one part.

    Attributes:
        device: where it runs.
        cells: what is done, and where more is put.
        smoke: tiny sizes, to try the program out.
        folder: where results of this device are.
        options: the command line's, by name.
    """

    device: Device
    cells: Cells
    smoke: bool
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)

    def measure(self, key: str, compute: Callable[[], Record]) -> None:
        """Measure one cell unless it is done; see `Cells.measure`."""
        self.cells.measure(key, compute, alive=lambda: synchronize(self.device))

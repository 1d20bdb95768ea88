"""Which GPUs the committed result files are of, and what they say of each kernel there.

A document's claim about a GPU is as good as the file behind it: a test compares them with these.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.__main__ import RESULTS


@dataclass(frozen=True)
class Measured:
    """One part's file of one GPU.

    Attributes:
        folder: of the GPU's results, by name.
        device: the GPU's name, as its driver has it.
        capability: compute capability, see `kernels.capability`.
        cells: the records, by name.
    """

    folder: str
    device: str
    capability: int
    cells: Mapping[str, Mapping[str, Any]]


def measured(part: str, results: Path = RESULTS) -> Iterator[Measured]:
    """The files `PART.json` that come from a GPU, by folder."""
    for file in sorted(results.glob(f"*/{part}.json")):
        record = json.loads(file.read_text())
        if record.get("capability") is not None:
            yield Measured(
                file.parent.name, record["device"], record["capability"], record["cells"]
            )


def equals_definition_on(kernel: str, results: Path = RESULTS) -> list[str]:
    """Names of the GPUs on which every check of `kernel` that ran agreed with its definition."""
    return [x.device for x in measured("exact", results) if _agreed(kernel, x.cells)]


def _agreed(kernel: str, cells: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether there are checks of the kernel, and none failed; refusals are no checks."""
    own = [cell for name, cell in cells.items() if name.split()[0] == kernel]
    checked = [cell for cell in own if "refused" not in cell]
    return bool(checked) and all(cell.get("differing") == 0 for cell in checked)


def evidence_for(oldest: int, newest: int, results: Path = RESULTS) -> list[str]:
    """GEMM tables of GPUs with a compute capability from `oldest` to `newest`: FOLDER/gemm.md."""
    files = measured("gemm", results)
    return [f"{x.folder}/gemm.md" for x in files if oldest <= x.capability <= newest]

"""What is said of GPUs: by the result files alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.ran_on import equals_definition_on, evidence_for, measured
from mergequant_vllm.kernels.selection.first_choices import GPUS, UNMEASURED
from mergequant_vllm.kernels.selection.linears import LINEAR_KERNELS

ROOT = Path(__file__).parents[3]
NOWHERE = "no GPU yet"
ON_GPUS = [x for x in LINEAR_KERNELS if not x.startswith("cpu-") and x != "reference"]


def write(results: Path, part: str, cells: dict[str, Any], capability: int | None = 90) -> None:
    folder = results / ("NVIDIA_H200" if capability else "CPU_AVX2")
    folder.mkdir(parents=True, exist_ok=True)
    head = {"device": folder.name.replace("_", " "), "capability": capability, "cells": cells}
    (folder / f"{part}.json").write_text(json.dumps(head))


def test_a_kernel_ran_where_all_its_checks_agreed(tmp_path: Path) -> None:
    good, refused = {"checks": 12, "differing": 0}, {"refused": "no float32"}
    cells = {"a W4A4": good, "a W8A8": refused, "b W4A4": good, "b W8A8": {"failed": "died"}}
    cells |= {"c W4A4": {"checks": 12, "differing": 3}, "d W4A4": refused}
    write(tmp_path, "exact", cells)
    write(tmp_path, "exact", {"b W4A4": good}, capability=None)
    ran = {kernel: equals_definition_on(kernel, tmp_path) for kernel in "abcde"}
    assert ran == {"a": ["NVIDIA H200"], "b": [], "c": [], "d": [], "e": []}


def test_tables_are_evidence_for_their_own_compute_capability(tmp_path: Path) -> None:
    write(tmp_path, "gemm", {})
    write(tmp_path, "gemm", {}, capability=None)
    assert evidence_for(90, 99, tmp_path) == ["NVIDIA_H200/gemm.md"]
    assert evidence_for(80, 89, tmp_path) == []


@pytest.mark.parametrize("row", GPUS, ids=lambda row: f"{row.oldest} {row.kind.name}")
def test_first_choices_name_the_tables_that_there_are(row: Any) -> None:
    tables = evidence_for(row.oldest, row.newest)
    assert (row.evidence == UNMEASURED) == (not tables)
    assert all(table in row.evidence for table in tables)


def cell_of(document: str, kernel: str) -> str:
    """The last cell of the first row of a document's tables that begins with the kernel."""
    lines = (ROOT / document).read_text().splitlines()
    rows = [x for x in lines if x.startswith("|") and f"`{kernel}`" in x.split("|")[1]]
    return rows[-1].rstrip("| ").rpartition("|")[2]


@pytest.mark.parametrize("document", ["docs/kernels.md", "README.md"])
@pytest.mark.parametrize("kernel", ON_GPUS)
def test_documents_say_where_a_kernel_ran(document: str, kernel: str) -> None:
    cell, gpus = cell_of(document, kernel), equals_definition_on(kernel)
    assert (NOWHERE in cell) == (not gpus), f"{document}, {kernel}: {gpus or NOWHERE}"
    assert all(gpu in cell for gpu in gpus)


def test_the_readme_says_that_nothing_ran_on_a_gpu_until_something_did() -> None:
    ran = any(list(measured(part)) for part in ("exact", "gemm", "serve"))
    assert ("Nothing has run on a GPU yet" in (ROOT / "README.md").read_text()) != ran

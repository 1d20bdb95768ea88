"""The GPU benchmarks run through on a CPU, go on where they stopped and draw their results.

The parts run in a process of their own, since Triton's interpreter is chosen by the environment.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PARTS = ("exact", "gemm", "quantize")
TWICE = """
import sys, time
from pathlib import Path
from benchmarks.gpu.run_part import run_part
for run, part in [(run, part) for run in "12" for part in sys.argv[2:]]:
    status = run_part(part, Path(sys.argv[1]), "a test", run, time.time() + 300, smoke=True)
    print(f"STATUS {run} {part} {status}", flush=True)
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this Python from the repository's root without a GPU, on one thread."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Results and output of all parts, run twice."""
    pytest.importorskip("triton", reason="Triton is not installed")
    results = tmp_path_factory.mktemp("results")
    done = python("-c", TWICE, str(results), *PARTS)
    assert done.returncode == 0, done.stdout + done.stderr
    return results, done.stdout


def cells(results: Path, part: str) -> dict[str, Any]:
    (path,) = results.glob(f"*/{part}.json")
    cells: dict[str, Any] = json.loads(path.read_text())["cells"]
    return cells


@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_without_a_gpu(smoke: tuple[Path, str], part: str) -> None:
    results, output = smoke
    assert f"STATUS 1 {part} 0" in output
    assert not [key for key, cell in cells(results, part).items() if "failed" in cell]
    (table,) = results.glob(f"*/{part}.md")
    assert "`a test`" in table.read_text()


@pytest.mark.parametrize("part", PARTS)
def test_a_second_run_measures_nothing(smoke: tuple[Path, str], part: str) -> None:
    results, output = smoke
    counts = re.findall(rf"^{part}: (\d+) cells measured now, (\d+) in all$", output, re.MULTILINE)
    done = str(len(cells(results, part)))
    assert counts == [(done, done), ("0", done)]


def test_nothing_differs_from_the_definitions(smoke: tuple[Path, str]) -> None:
    exact = cells(smoke[0], "exact")
    checked = {key: cell for key, cell in exact.items() if "checks" in cell}
    assert not [key for key, cell in checked.items() if cell["differing"]]
    kernels = {key.split()[0] for key in checked}
    assert {"triton", "triton-static_codes", "triton-token_codes", "cpu-fp32"} <= kernels


def test_refusals_are_recorded_with_their_reason(smoke: tuple[Path, str]) -> None:
    refused = [c for k, c in cells(smoke[0], "exact").items() if k.startswith("marlin-int8")]
    assert all(
        cell["refused"] == "it runs on NVIDIA GPUs and the layer is on cpu" for cell in refused
    )
    cell = cells(smoke[0], "gemm")["tiny qkv M=1"]["subjects"]
    assert cell["vllm marlin W4A16"]["refused"] == "it needs an NVIDIA GPU and this is cpu"
    assert cell["torch bf16"]["us"] > 0 and cell["triton"]["us"] > 0
    (table,) = smoke[0].glob("*/gemm.md")
    assert "it needs an NVIDIA GPU" in table.read_text()


def test_plots_are_drawn_from_what_is_on_disk(smoke: tuple[Path, str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from benchmarks.gpu.plots import draw_all

    drawn = {path.name for path in draw_all(smoke[0])}
    assert {"gemm-tiny-qkv.png", "gemm-tiny-down.png", "quantize-us.png"} <= drawn


def test_the_command_runs_a_part_and_obeys_its_limit(smoke: tuple[Path, str]) -> None:
    arguments = ("-m", "benchmarks.gpu", "quantize", "--smoke", "--results", str(smoke[0]))
    late = python(*arguments, "--again", "--minutes", "0")
    assert late.returncode == 3 and "time is up" in late.stdout
    done = python(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "quantize: 0 cells measured now" in done.stdout
    assert python("-m", "benchmarks.gpu", "speed").returncode == 2

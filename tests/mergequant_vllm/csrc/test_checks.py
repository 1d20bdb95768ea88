"""The C++ checks (checks.cpp) on builds on which PyTorch does not run: sanitizers, ARM emulated."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.mergequant_vllm.csrc.building import ROOT, build_extension

HERE = Path(__file__).parent
SOURCES = ROOT / "mergequant_vllm" / "csrc"
SANITIZED = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ARM_LIBRARIES = "/usr/aarch64-linux-gnu"


def build(folder: Path, compiler: str, flags: str = "") -> Path:
    """The library as setup.py builds it, and the checks linked with it; returns their program."""
    done = build_extension(folder, CXX=compiler, CXXFLAGS=flags, MERGEQUANT_NATIVE="require")
    assert done.returncode == 0, done.stderr[-3000:]
    library, program = folder / "mergequant_vllm" / "libmergequant.so", folder / "checks"
    # A product and a sum must not become one operation here either.
    options = ["-std=c++17", "-O2", "-ffp-contract=off", *flags.split(), f"-I{SOURCES}"]
    linked = [str(library), f"-Wl,-rpath,{library.parent}", "-lgomp"]
    _run([compiler, *options, str(HERE / "checks.cpp"), *linked, "-o", str(program)])
    return program


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def find_compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    pytest.skip("no C++ compiler is installed")


def test_no_instruction_set_reads_or_writes_where_it_must_not(tmp_path: Path) -> None:
    program = build(tmp_path, find_compiler(), SANITIZED)
    # vLLM preloads libraries once it has run in this process; the sanitizer must come first.
    alone = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    said = _run([str(program)], {**alone, "OMP_NUM_THREADS": "2"})
    assert "portable ran" in said
    assert "\n0 of " in said


def test_the_kernels_for_arm_are_exact_on_an_emulated_cpu(tmp_path: Path) -> None:
    for tool in (ARM_COMPILER, ARM_EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    program = build(tmp_path, ARM_COMPILER)
    threads = dict(os.environ, OMP_NUM_THREADS="2")
    said = _run([ARM_EMULATOR, "-cpu", "max", "-L", ARM_LIBRARIES, str(program)], threads)
    assert "neon-dotprod ran" in said
    assert "portable ran" in said
    assert "\n0 of " in said

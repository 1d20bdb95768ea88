"""setup.py where there is no compiler: the package installs all the same, and one line says so."""

from pathlib import Path

import pytest

from tests.mergequant_vllm.csrc.building import build_extension


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"CXX": "no-such-compiler"}, "no native CPU kernels, linears will run in PyTorch"),
        ({"CXX": "", "PATH": "/nowhere"}, "none of c++, g++, clang++ is installed"),
        ({"CXXFLAGS": "--no-such-flag"}, "no native CPU kernels, linears will run in PyTorch"),
        ({"MERGEQUANT_NATIVE": "skip"}, "MERGEQUANT_NATIVE=skip: no native CPU kernels"),
    ],
    ids=["absent", "none", "failing", "skipped"],
)
def test_it_is_said_and_nothing_is_built(
    tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    stale = tmp_path / "mergequant_vllm" / "libmergequant.so"
    stale.parent.mkdir()
    stale.write_bytes(b"of an earlier build")
    done = build_extension(tmp_path, **variables)
    assert done.returncode == 0
    assert said in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_it_is_an_error_where_the_kernels_are_required(tmp_path: Path) -> None:
    done = build_extension(tmp_path, CXX="no-such-compiler", MERGEQUANT_NATIVE="require")
    assert done.returncode != 0
    assert "The native CPU kernels cannot be built" in done.stderr

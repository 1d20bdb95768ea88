"""Where the native kernels cannot run, one clause says why, and PyTorch's kernel serves."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergequant_vllm.kernels import native_library as native
from mergequant_vllm.kernels.selection import linears as select
from tests.mergequant_vllm.kernels.made import make_spec
from tests.mergequant_vllm.kernels.native_sets import runnable


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """What was found out on this machine is found out again."""
    caches = (native.library, native._default_isa, select._log_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def built() -> None:
    if not native.LIBRARY.is_file():
        pytest.skip("the native kernels were not built")


def test_a_library_that_was_not_built_is_said_once_and_pytorch_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "absent.so")
    with caplog.at_level(logging.INFO, logger="vllm.mergequant"):
        for _ in range(2):
            assert select.select_linear(make_spec(), None).name == "cpu-fp32"
    (line,) = [record.getMessage() for record in caplog.records]
    assert "run on kernel 'cpu-fp32' (cpu)" in line
    assert "'cpu-int4' was refused: the native kernels were not built: install a C++" in line


def test_a_library_that_cannot_be_loaded_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "broken.so"
    file.write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", file)
    assert "cannot be loaded" in str(native.refusal())
    assert "build them here" in str(native.refusal())


AVX512 = {"avx2", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"}
NEEDED = {
    "portable": set(),
    "avx2": {"avx2", "f16c"},
    "avx512": AVX512,
    "avx512-vnni": {*AVX512, "avx512_vnni"},
    "neon-dotprod": {"asimddp"},
}


@pytest.mark.parametrize("isa", NEEDED)
@pytest.mark.usefixtures("built")
def test_the_tests_go_through_every_set_that_linux_says_the_cpu_has(isa: str) -> None:
    if not NEEDED[isa] <= set(Path("/proc/cpuinfo").read_text().split()):
        assert isa not in runnable()
        pytest.skip(f"{isa} does not run on this CPU")
    assert isa in runnable()


@pytest.mark.usefixtures("built")
def test_an_unknown_cpu_is_refused_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    portable = {"portable": native.instruction_sets()["portable"]}
    monkeypatch.setattr(native, "instruction_sets", lambda: portable)
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    assert "none of AVX2, AVX-512 and the NEON dot product" in str(native.refusal())
    monkeypatch.setenv(native.ISA_VARIABLE, "portable")
    assert native.refusal() is None
    assert native.isa_name() == "portable"


@pytest.mark.usefixtures("built")
def test_an_instruction_set_that_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, "avx1024")
    assert "MERGEQUANT_CPU_ISA='avx1024' does not run here: choose one of portable" in str(
        native.refusal()
    )


@pytest.mark.usefixtures("built")
def test_the_fastest_that_runs_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    sets = list(native.instruction_sets())
    if sets == ["portable"]:
        pytest.skip("this CPU has no instruction set of its own")
    assert native.isa_name() == sets[-1]
    assert select.select_linear(make_spec(), None).name == "cpu-int4"

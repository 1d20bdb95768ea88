"""The instruction sets that tests of the native kernels go through."""

from collections.abc import Iterator

import pytest

from mergequant_vllm.kernels import native

KNOWN = ("portable", "avx2", "avx512", "avx512-vnni", "neon-dotprod")


def runnable() -> list[str]:
    """Those that were compiled in and run on this CPU."""
    return list(native.instruction_sets()) if native.LIBRARY.is_file() else []


@pytest.fixture(params=runnable() or [pytest.param("none", marks=pytest.mark.skip("not built"))])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn; `test_native_library` shows which are left out here."""
    with native.using(request.param):
        yield request.param

"""Fixtures of the kernels' tests."""

from collections.abc import Iterator

import pytest

from mergequant_vllm.kernels import native_library as native
from tests.mergequant_vllm.kernels.native_sets import runnable


@pytest.fixture(params=runnable() or [pytest.param("none", marks=pytest.mark.skip("not built"))])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn; `test_native_library` shows which are left out here."""
    with native.using(request.param):
        yield request.param

"""Models and texts that several tests share, made once a process; how tests run side by side."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergequant import Options, quantize
from tests.tiny import make_model, write_text

# Steps, clips and GPTQ as the paper has them, on little text; the rest has tests of its own.
SMALL = Options(
    statistics_samples=4,
    gptq_samples=8,
    sequence_length=64,
    rotation="none",
    static_zero_points=False,
    input_correction=False,
    reconstruction="none",
    split_by="step",
    staggered=False,
    weight_search="minmax",
    compensation_rank=0,
)
# Every step of the method.
# As little as makes a checkpoint, for tests that look at what surrounds its codes.
FEW = Options(
    sequence_length=32,
    statistics_samples=2,
    gptq_samples=2,
    compensation_rank=0,
    rotation="none",
    reconstruction="none",
)
WHOLE = SMALL.model_copy(
    update={
        "reconstruction": "pad",
        "alpha": 0.0,
        "max_extra_channels": 0.25,
        "split_by": "folded",
        "staggered": True,
        "weight_search": "mse",
        "static_zero_points": True,
        "input_correction": True,
        "compensation_rank": 4,
        "compensation_epochs": 1,
        "compensation_samples": 4,
    }
)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument: compressed ones hold the clock, and workers must agree."""
    return argname if isinstance(val, bytes) else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """How tests are shared out when they run side by side (pytest-xdist).

    A file stays with one worker, whose fixtures its tests share. The folder of the engines does so
    as a whole, one engine after another: each wants the memory and the cores.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "engine" if nodeid.startswith("tests/engine/") else super()._split_scope(nodeid)

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def _frozen_imports() -> Iterator[None]:
    """The quantizer collects garbage after each block; what was imported need not be looked at."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of some 20,000 tokens."""
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 blocks, untied."""
    return make_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, llama: Path, text: Path) -> Path:
    """`llama` quantized with few samples."""
    output = tmp_path_factory.mktemp("checkpoints") / "llama"
    return quantize(llama, output, [text], SMALL, progress=False)

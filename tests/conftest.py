"""Models and texts that several tests share, made once a run."""

from pathlib import Path

import pytest

from mergequant import Options, quantize
from tests.tiny import make_model, write_text

SMALL = Options(statistics_samples=4, gptq_samples=8, sequence_length=64)


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

"""A disk that is too small, found before the first block, and one that fills up all the same."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from mergequant import InputError, quantize
from mergequant.errors import DiskError
from mergequant.model.reader import Reader
from mergequant.output import disk_space
from mergequant.output.disk_space import checkpoint_bytes, refuse_if_full
from mergequant.output.durable_files import write_durably, write_json
from mergequant_vllm.format import parse
from tests.conftest import FEW


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system lets no file of this process grow beyond `size` bytes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_loses_nothing_that_is_finished(
    tmp_path: Path, llama: Path, text: Path
) -> None:
    whole = quantize(llama, tmp_path / "whole", [text], FEW, progress=False)
    largest = max(x.stat().st_size for x in whole.glob("*.safetensors"))  # around the blocks
    output = tmp_path / "out"
    with files_of_at_most(largest - 1), pytest.raises(DiskError) as caught:
        quantize(llama, output, [text], FEW, progress=False)
    assert "File too large" in str(caught.value) and "run the same command again" in str(
        caught.value
    )
    left = {x.name for x in (output / ".partial").iterdir()}
    assert {f"model-0000{x}-of-00003.safetensors" for x in (1, 2)} <= left
    assert not [name for name in left if name.endswith(".tmp")]
    quantize(llama, output, [text], FEW, progress=False)
    for file in whole.glob("*.safetensors"):
        assert (output / file.name).read_bytes() == file.read_bytes()


def test_a_disk_that_is_full_at_the_first_block_leaves_nothing(
    tmp_path: Path, llama: Path, text: Path
) -> None:
    with files_of_at_most(1000), pytest.raises(DiskError, match="cannot be written"):
        quantize(llama, tmp_path / "out", [text], FEW, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_refused_first(
    tmp_path: Path, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**7))
    with pytest.raises(InputError, match=r"takes 0\.1 GB and the disk of .* has 0\.0 GB free"):
        quantize(llama, tmp_path / "out", [text], FEW, progress=False)
    assert not (tmp_path / "out").exists()


def test_what_is_written_already_need_not_be_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    refuse_if_full(tmp_path / "a" / "b", 100)
    with pytest.raises(InputError, match="free some there"):
        refuse_if_full(tmp_path / "a" / "b", 101)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "shard").write_bytes(bytes(50))
    refuse_if_full(tmp_path / "a", 150)


def test_the_estimate_is_what_the_tensors_take(checkpoint: Path) -> None:
    reader = Reader(checkpoint)
    estimate = checkpoint_bytes(parse(reader.config["quantization_config"]), 4)
    files = sum(x.stat().st_size for x in checkpoint.glob("*.safetensors"))
    headers = 200 * len(reader.headers)
    assert files - headers <= estimate - disk_space._BESIDE <= files


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "x", object())
    with pytest.raises(DiskError, match="No such file"):
        write_durably(tmp_path / "none" / "x", lambda path: path.write_text("a"))
    assert not list(tmp_path.iterdir())

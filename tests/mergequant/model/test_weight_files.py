"""Which file counts for a tensor: an index, one whole file, numbered shards, and contradictions."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergequant.errors import InputError
from mergequant.model.reader import Reader
from mergequant.model.weight_files import find_weights

INDEX = "model.safetensors.index.json"


def store(folder: Path, file: str, **tensors: float) -> None:
    save_file({name: torch.tensor([value]) for name, value in tensors.items()}, folder / file)


def index(folder: Path, **files: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def read(folder: Path) -> dict[str, float]:
    (folder / "config.json").write_text("{}")
    reader = Reader(folder)
    return {name: float(reader.read(name)) for name in reader.headers}


def test_the_index_says_which_of_two_files_counts(tmp_path: Path) -> None:
    store(tmp_path, "a.safetensors", x=1.0, y=2.0)
    store(tmp_path, "b.safetensors", x=3.0, z=4.0)
    index(tmp_path, x="a.safetensors", y="a.safetensors", z="b.safetensors")
    assert read(tmp_path) == {"x": 1.0, "y": 2.0, "z": 4.0}
    index(tmp_path, x="b.safetensors", y="a.safetensors", z="b.safetensors")
    assert read(tmp_path) == {"x": 3.0, "y": 2.0, "z": 4.0}


def test_without_an_index_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    store(tmp_path, "a.safetensors", x=1.0)
    store(tmp_path, "b.safetensors", x=3.0)
    with pytest.raises(InputError, match=r"'x' is in a\.safetensors and in b\.safetensors"):
        find_weights(tmp_path)


def test_an_index_of_missing_shards_gives_way_to_the_whole_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store(tmp_path, "model.safetensors", x=1.0, y=2.0)
    index(tmp_path, x="model-00001-of-00002.safetensors", y="model-00002-of-00002.safetensors")
    assert read(tmp_path) == {"x": 1.0, "y": 2.0}
    assert "names shards that are not there" in caplog.text
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors is missing"):
        find_weights(tmp_path)


def test_the_whole_file_counts_beside_shards_that_no_index_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store(tmp_path, "model.safetensors", x=1.0)
    store(tmp_path, "model-00001-of-00001.safetensors", x=2.0)
    assert read(tmp_path) == {"x": 1.0}
    assert "no index names them" in caplog.text


def test_numbered_shards_are_all_there_or_refused(tmp_path: Path) -> None:
    store(tmp_path, "model-00001-of-00003.safetensors", x=1.0)
    store(tmp_path, "model-00003-of-00003.safetensors", z=3.0)
    with pytest.raises(InputError, match=r"model-00002-of-00003\.safetensors is missing"):
        find_weights(tmp_path)
    store(tmp_path, "model-00002-of-00003.safetensors", y=2.0)
    assert read(tmp_path) == {"x": 1.0, "y": 2.0, "z": 3.0}


def test_the_publishers_duplicates_are_left_out(tmp_path: Path) -> None:
    store(tmp_path, "model.safetensors", x=1.0)
    store(tmp_path, "consolidated.safetensors", x=2.0)
    assert read(tmp_path) == {"x": 1.0}

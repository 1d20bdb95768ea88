"""Tiles: the defaults, the search space, and the tables that benchmarks write."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mergequant_vllm.kernels.linear.triton import tile_tables
from mergequant_vllm.kernels.linear.triton.tile_tables import (
    FOLDER_VARIABLE,
    SHIPPED,
    file_name,
    load_table,
    save_table,
    table_of,
    tile_for,
)
from mergequant_vllm.kernels.linear.triton.tiles import (
    LinearShape,
    Tile,
    candidates,
    default_tile,
    fit_to_layout,
    shared_bytes,
    shared_limit,
)

SHAPE = LinearShape(4096, 4096, 4, None)
SHAPES = [
    LinearShape(n, k, bits, group)
    for n, k in ((1, 1), (4096, 4096), (28672, 896))
    for bits in (3, 4, 8)
    for group in (None, 32, 96, 128, 512)
]
CAPABILITIES = [80, 86, 90, 100, 120, None]
TABLE = {
    SHAPE: [(16, Tile(16, 32, 256, 2, 6)), (512, Tile(64, 64, 128, 4, 4))],
    LinearShape(4096, 4096, 4, 128): [(1, Tile(16, 64, 128, 4, 4))],
}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_default_tiles_fit(capability: int | None) -> None:
    limit = shared_limit(capability)
    for shape in SHAPES:
        for tokens in (1, 16, 17, 64, 65, 300, 8192):
            tile = default_tile(shape, tokens, limit)
            assert tile == fit_to_layout(tile, shape.layout)
            assert shared_bytes(tile, shape) <= limit
            assert tile.num_stages >= 2


def test_default_tiles_grow_with_tokens_and_outputs() -> None:
    limit = shared_limit(90)
    chosen = [default_tile(SHAPE, tokens, limit)[:2] for tokens in (1, 16, 17, 64, 128, 512, 8192)]
    assert chosen == [(16, 32), (16, 32), (32, 32), (32, 64), (64, 64), (128, 128), (128, 256)]
    assert default_tile(LinearShape(28672, 4096, 4, None), 1, limit)[:2] == (16, 128)
    assert default_tile(LinearShape(28672, 4096, 4, 128), 8192, limit)[:2] == (128, 128)


@pytest.mark.parametrize("capability", [80, 86, 90])
def test_candidates_fit_and_hold_what_the_kernel_can_run(capability: int | None) -> None:
    limit = shared_limit(capability)
    for shape in SHAPES:
        for tokens in (1, 64, 8192):
            found = candidates(shape, tokens, limit)
            assert 4 <= len(found) == len(set(found)) <= 250, (shape, tokens, len(found))
            for tile in found:
                assert tile == fit_to_layout(tile, shape.layout)
                assert shared_bytes(tile, shape) <= limit


def test_tables_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / file_name("NVIDIA H200")
    assert path.name == "NVIDIA_H200.json"
    save_table(path, "NVIDIA H200", TABLE)
    assert load_table(path) == TABLE
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_an_invalid_table_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    save_table(path, "a GPU", TABLE)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="block_m"):
        save_table(path, "a GPU", {SHAPE: [(1, Tile(17, 32, 256, 2, 6))]})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("block_m", 24, "linears.0.tiles.0.block_m: Input should be 16, 32, 64, 128 or 256"),
        ("num_stages", 0, "linears.0.tiles.0.num_stages: Input should be greater than"),
        ("block_k", "128", "linears.0.tiles.0.block_k: Input should be"),
        ("tokens", 512, "linears.0.tiles: tokens do not ascend: [512, 512]"),
        ("speed", 1, "linears.0.tiles.0.speed: Extra inputs are not permitted"),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, field: str, value: object, named: str) -> None:
    path = tmp_path / "table.json"
    save_table(path, "a GPU", TABLE)
    table = json.loads(path.read_text())
    table["linears"][0]["tiles"][0][field] = value
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=r"table\.json") as caught:
        load_table(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: {named}")
    assert sentence.endswith("; measure again or delete it.") and "\n" not in sentence


@pytest.mark.parametrize("text", ["", "[]", '{"gpu": "a GPU"}'])
def test_what_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="measure again or delete it"):
        load_table(path)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """PyTorch says that there is an H200."""
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for cached in (table_of, tile_tables._tile_for):
        cached.cache_clear()
    yield torch.device("cuda", 0)
    for cached in (table_of, tile_tables._tile_for):
        cached.cache_clear()


def test_measured_tiles_are_taken(
    gpu: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "NVIDIA_H200.json"
    save_table(path, "NVIDIA H200", TABLE)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with caplog.at_level(logging.INFO, logger="vllm.mergequant"):
        chosen = [tile_for(SHAPE, tokens, gpu) for tokens in (1, 16, 17, 512, 513)]
        other = tile_for(LinearShape(4096, 4096, 8, None), 1, gpu)
    small, large = (tile for _, tile in TABLE[SHAPE])
    assert chosen == [small, small, large, large, large]
    assert other == default_tile(LinearShape(4096, 4096, 8, None), 1, shared_limit(90))
    assert caplog.messages == [f"INT4 linears take the tiles measured in {path}"]


def test_defaults_are_taken_without_a_table_and_said_so_once(
    gpu: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tile_tables, "SHIPPED", tmp_path)
    with caplog.at_level(logging.INFO, logger="vllm.mergequant"):
        assert tile_for(SHAPE, 1, gpu) == default_tile(SHAPE, 1, shared_limit(90))
        tile_for(SHAPE, 2, gpu)
    assert caplog.messages == ["INT4 linears take default tiles: none were measured on NVIDIA H200"]


def test_a_folder_that_is_none_is_refused(
    gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"MERGEQUANT_TILES='.*absent' is not a folder\."):
        tile_for(SHAPE, 1, gpu)


def test_a_table_of_another_gpu_is_refused(
    gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_table(tmp_path / "NVIDIA_H200.json", "NVIDIA A100", TABLE)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match="gpu: it is 'NVIDIA A100' and this is 'NVIDIA H200'"):
        tile_for(SHAPE, 1, gpu)


def test_shipped_tables_are_tables() -> None:
    tables = list(SHIPPED.glob("*.json"))
    if not tables:
        pytest.skip("no table is shipped: no GPU has been tuned for")
    for path in tables:
        assert path.name == file_name(json.loads(path.read_text())["gpu"])
        assert load_table(path)


def test_the_interpreter_takes_defaults() -> None:
    assert tile_for(SHAPE, 1, torch.device("cpu")) == default_tile(SHAPE, 1, shared_limit(None))

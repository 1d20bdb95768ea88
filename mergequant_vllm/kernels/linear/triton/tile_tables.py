"""Which tile the Triton linear runs: a measured one where a table of the GPU has it, or a default.

Tables are JSON files, one a GPU, in `tuned/` or in the folder that MERGEQUANT_TILES names, which
comes first. A benchmark makes them, never a server: tuning while serving would vary from run to run
and cannot happen while CUDA graphs are captured.
"""

import functools
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergequant_vllm.kernels.capability import read_capability
from mergequant_vllm.kernels.linear.triton.tiles import (
    LinearShape,
    Tile,
    default_tile,
    fit_to_layout,
    shared_limit,
)

FOLDER_VARIABLE = "MERGEQUANT_TILES"
SHIPPED = Path(__file__).parent / "tuned"

# The largest number of tokens and the tile for up to as many, ascending; the last serves all above.
Ladder = Sequence[tuple[int, Tile]]

logger = logging.getLogger("vllm.mergequant")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Entry(_Strict):
    """A tile of the file, with the largest number of tokens that it serves."""

    tokens: int = Field(ge=1)
    block_m: Literal[16, 32, 64, 128, 256]
    block_n: Literal[16, 32, 64, 128, 256]
    block_k: Literal[32, 64, 128, 256, 512]
    num_warps: Literal[1, 2, 4, 8, 16]
    num_stages: int = Field(ge=1, le=8)

    def rung(self) -> tuple[int, Tile]:
        return self.tokens, Tile(**self.model_dump(exclude={"tokens"}))


class _Linear(_Strict):
    out_features: int = Field(ge=1)
    in_features: int = Field(ge=1)
    weight_bits: Literal[3, 4, 8]
    group_size: int | None = Field(ge=32, multiple_of=32)
    tiles: list[_Entry] = Field(min_length=1)

    def shape(self) -> LinearShape:
        return LinearShape(**self.model_dump(exclude={"tiles"}))


class _Table(_Strict):
    gpu: str
    linears: list[_Linear]


def file_name(gpu: str) -> str:
    """The table's file: "NVIDIA H200" to "NVIDIA_H200.json"."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", gpu) + ".json"


def load_table(path: Path, gpu: str | None = None) -> dict[LinearShape, Ladder]:
    """Read a table.

    Args:
        path: its file.
        gpu: the GPU that it must have been measured on; None: any.

    Raises:
        ValueError: the file is no table; names the file and the field.
    """
    try:
        table = _Table.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise _broken(path, field, first["msg"]) from None
    if gpu not in (None, table.gpu):
        raise _broken(path, "gpu", f"it is {table.gpu!r} and this is {gpu!r}")
    found: dict[LinearShape, Ladder] = {}
    for number, linear in enumerate(table.linears):
        rungs = [entry.rung() for entry in linear.tiles]
        tokens = [most for most, _ in rungs]
        if tokens != sorted(set(tokens)):
            field = f"linears.{number}.tiles"
            raise _broken(path, field, f"tokens do not ascend: {tokens}")
        found[linear.shape()] = rungs
    return found


def _broken(path: Path, field: str, reason: str) -> ValueError:
    return ValueError(f"{path}: {field}: {reason}; measure again or delete it.")


def save_table(path: Path, gpu: str, table: Mapping[LinearShape, Ladder]) -> None:
    """Write a table, whole or not at all.

    Args:
        path: its file; `file_name(gpu)` is where a server looks.
        gpu: the name that `torch.cuda.get_device_name` gives.
        table: measured tiles.
    """
    linears = [
        {
            **shape._asdict(),
            "tiles": [{"tokens": most, **tile._asdict()} for most, tile in ladder],
        }
        for shape, ladder in table.items()
    ]
    text = json.dumps({"gpu": gpu, "linears": linears}, indent=1) + "\n"
    _Table.model_validate_json(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


def tile_for(shape: LinearShape, tokens: int, device: torch.device) -> Tile:
    """The tile to run: the same in every run on one GPU.

    Args:
        shape: the linear.
        tokens: M, at least 1.
        device: a GPU; the CPU for the interpreter.
    """
    if device.type == "cpu":
        return default_tile(shape, tokens, shared_limit(None))
    return _tile_for(shape, tokens, device.index or 0)


@functools.lru_cache(maxsize=4096)
def _tile_for(shape: LinearShape, tokens: int, device: int) -> Tile:
    ladder = table_of(torch.cuda.get_device_name(device)).get(shape)
    if ladder is None:
        return default_tile(shape, tokens, shared_limit(read_capability(device)))
    tile = next((tile for most, tile in ladder if tokens <= most), ladder[-1][1])
    return fit_to_layout(tile, shape.layout)


@functools.cache
def table_of(gpu: str) -> dict[LinearShape, Ladder]:
    """The measured tiles of the GPU named `gpu`, or none; says once which it is.

    Raises:
        ValueError: the user's folder is none, or the table is broken.
    """
    folders = [SHIPPED]
    asked = os.environ.get(FOLDER_VARIABLE)
    if asked:
        if not Path(asked).is_dir():
            raise ValueError(f"{FOLDER_VARIABLE}={asked!r} is not a folder.")
        folders.insert(0, Path(asked))
    for folder in folders:
        path = folder / file_name(gpu)
        if path.is_file():
            logger.info("INT4 linears take the tiles measured in %s", path)
            return load_table(path, gpu)
    logger.info("INT4 linears take default tiles: none were measured on %s", gpu)
    return {}

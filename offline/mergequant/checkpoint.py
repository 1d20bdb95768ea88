"""Hugging Face folders: a lazy reader, and a writer that leaves a whole checkpoint or nothing."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergequant.errors import InputError
from mergequant_vllm.format import QUANT_METHOD, StoredTensor

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
STAGING = ".partial"
# Some publishers store the same weights a second time under this name.
DUPLICATES = "consolidated*"
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def locate(model: str | Path) -> Path:
    """The folder of a model: a local one, or a hub id's snapshot (downloaded if need be)."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{model} is a file: give the model's folder.")
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise InputError(f"Model folder {str(model)!r} does not exist: check the path.")
    try:
        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
        return Path(
            snapshot_download(
                str(model), allow_patterns=patterns, ignore_patterns=f"{DUPLICATES}.safetensors"
            )
        )
    except Exception as error:  # the hub client raises many types, all meaning: not to be had
        raise InputError(
            f"{str(model)!r} is neither a folder nor a model that the Hugging Face hub gives "
            f"({type(error).__name__}): check the name, the network and your access."
        ) from error


class Reader:
    """A model's folder, tensors read one at a time.

    Attributes:
        folder: where the files are.
        config: `config.json`.
        stored: shape and dtype of each tensor, by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = self._read_config()
        self._file_of: dict[str, Path] = {}
        self.stored: dict[str, StoredTensor] = {}
        for file in self._files():
            for name, entry in read_header(file).items():
                self.stored[name] = entry
                self._file_of[name] = file

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / CONFIG
        if not path.is_file():
            raise InputError(f"{self.folder} holds no {CONFIG}: it is not a Hugging Face model.")
        try:
            config: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path} is not JSON ({error}): download the model again.") from error
        return config

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        if index.is_file():
            files = sorted(self.folder / name for name in set(_weight_map(index).values()))
        else:
            duplicates = set(self.folder.glob(f"{DUPLICATES}.safetensors"))
            files = sorted(set(self.folder.glob("*.safetensors")) - duplicates)
        if not files:
            raise InputError(
                f"{self.folder} holds no safetensors weights: convert the model with "
                "save_pretrained(..., safe_serialization=True)."
            )
        for file in files:
            if not file.is_file():
                raise InputError(f"Shard {file} is missing: download the model again.")
        return files

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, by name."""
        return {name: entry.shape for name, entry in self.stored.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, in its stored dtype, on the CPU, in memory of its own."""
        with safe_open(self._file_of[name], framework="pt") as tensors:
            # A copy: pages of the mapped file must not stay with the tensor.
            tensor: Tensor = tensors.get_tensor(name).clone()
        return tensor

    def read_block(self, prefix: str) -> dict[str, Tensor]:
        """All tensors below module `prefix`, by their name within it."""
        start = f"{prefix}."
        return {x.removeprefix(start): self.read(x) for x in self.stored if x.startswith(start)}

    def check_finite(self) -> None:
        """Raise InputError naming the first tensor with a NaN or an infinity."""
        for name in self.stored:
            tensor = self.read(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InputError(
                    f"Tensor {name!r} of {self.folder} holds NaN or infinity: "
                    "the model is damaged; download it again."
                )

    def refuse_quantized(self) -> None:
        """Raise InputError if the model is quantized already."""
        quantized = self.config.get("quantization_config") or self.config.get("compression_config")
        if quantized:
            method = quantized.get("quant_method", "unknown")
            raise InputError(
                f"{self.folder} is quantized already (quant_method {method!r}): "
                "give the 16-bit model that it was made from."
            )


class Writer:
    """A checkpoint in the making, in a hidden folder of its own; it comes out whole or not at all.

    Staging inside the output works where that is a mount or a link; `config.json` comes out last.
    Use as a context manager: what is unfinished when the block is left is removed, folders that
    were made for it too.
    """

    def __init__(self, output: Path, shards: int) -> None:
        self.output = output
        self.staging = output / STAGING
        self._shards = shards
        self._weight_map: dict[str, str] = {}
        self._bytes = 0
        self._made: list[Path] = []
        self._finished = False
        if output.exists() and not output.is_dir():
            raise InputError(f"Output {output} is a file: choose another name.")
        if output.is_dir() and any(path.name != STAGING for path in output.iterdir()):
            raise InputError(f"Output folder {output} is not empty: choose another or remove it.")

    def __enter__(self) -> "Writer":
        self._made = [path for path in (self.output, *self.output.parents) if not path.exists()]
        try:
            shutil.rmtree(self.staging, ignore_errors=True)  # left by a run that was killed
            self.staging.mkdir(parents=True)
        except OSError as error:
            self._clean_up()
            raise InputError(
                f"{self.output} cannot be written ({error}): choose another."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if not self._finished:
            self._clean_up()

    def _clean_up(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def write_shard(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write shard `number`, counted from 0, atomically."""
        name = f"model-{number + 1:05d}-of-{self._shards:05d}.safetensors"
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        partial = self.staging / f"{name}.partial"
        save_file(whole, partial, metadata={"format": "pt"})
        partial.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
        os.replace(partial, self.staging / name)
        for key, value in whole.items():
            self._weight_map[key] = name
            self._bytes += value.nbytes

    def headers(self) -> dict[str, StoredTensor]:
        """Shape and dtype of each tensor written so far, as the files say."""
        files = sorted(self.staging.glob("*.safetensors"))
        return {name: entry for file in files for name, entry in read_header(file).items()}

    def report(self, line: Mapping[str, Any]) -> None:
        """Add one line to the checkpoint's `quantization_report.jsonl`."""
        with (self.staging / "quantization_report.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def finish(self, source: Reader, quantization_config: Mapping[str, Any]) -> None:
        """Write the index and config, copy the tokenizer, and move everything into place."""
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._weight_map}
        _write_json(self.staging / INDEX, index)
        _write_json(
            self.staging / CONFIG, {**source.config, "quantization_config": quantization_config}
        )
        for file in _copied_files(source.folder):
            shutil.copyfile(file, self.staging / file.name)
        names = sorted(path.name for path in self.staging.iterdir())
        for name in sorted(names, key=lambda name: name == CONFIG):
            os.replace(self.staging / name, self.output / name)
        self.staging.rmdir()
        self._finished = True


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index} is not an index of shards: download the model again.") from error
    return weight_map


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Shape and dtype of each tensor of one safetensors file, by name."""
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(tuple(entry.get_shape()), entry.get_dtype())
                for name, entry in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"Shard {file} cannot be read ({error}): it is truncated or not a safetensors "
            "file; download it again."
        ) from error


def _copied_files(folder: Path) -> Iterator[Path]:
    for name in COPIED:
        if (folder / name).is_file():
            yield folder / name


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def is_mergequant(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a mergequant checkpoint."""
    quantized = config.get("quantization_config") or {}
    return bool(quantized.get("quant_method") == QUANT_METHOD)

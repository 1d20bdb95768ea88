"""A model's folder: its configuration and tensors, read one at a time.

`ModelReader` is what the quantizer asks of a model. `Reader` reads it from a Hugging Face folder;
`UntiedReader`, `EqualizedReader` and `RotatedReader` are views of another reader's model.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from mergequant.errors import InputError
from mergequant.methods.rotate import OnlineRotation
from mergequant.model.other_kinds import refuse_other_kinds
from mergequant.model.settled_config import settle
from mergequant.model.stored_names import stored_names
from mergequant.model.weight_files import DUPLICATES, find_weights
from mergequant_vllm.format import QUANT_METHOD, StoredTensor

CONFIG = "config.json"


def locate(model: str | Path) -> Path:
    """The folder of a model: a local one, or a hub id's snapshot (downloaded if need be).

    A hub id may end with `@` and a branch, tag or commit. Cache, token and offline mode are those
    of `huggingface_hub`: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{model} is a file: give the model's folder.")
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise InputError(f"Model folder {str(model)!r} does not exist: check the path.")
    try:
        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "*.py"]
        patterns += ["LICENSE*", "LICENCE*", "NOTICE*"]
        name, _, revision = str(model).partition("@")
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=patterns,
                ignore_patterns=f"{DUPLICATES}.safetensors",
            )
        )
    except Exception as error:  # the hub client raises many types, all meaning: not to be had
        raise InputError(
            f"{str(model)!r} is neither a folder nor a model that the Hugging Face hub gives "
            f"({type(error).__name__}): check the name, the network and your access."
        ) from error


def at_revision(model: str, revision: str | None) -> str:
    """A hub id with its branch, tag or commit; raises InputError for a local folder."""
    if revision is None:
        return model
    if Path(model).exists():
        raise InputError(f"--revision is of hub ids, and {model} is a folder: leave it out.")
    if "@" in model:
        raise InputError(f"--revision and {model}: give the revision once.")
    return f"{model}@{revision}"


class ModelReader(ABC):
    """A model, tensors read one at a time.

    Attributes:
        folder: where the files are.
        config: `config.json`.
        headers: shape and dtype of each tensor, by name.
        online: the rotation that a linear's weight expects of its input, by full name; the source
            model's have none.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        headers: Mapping[str, StoredTensor],
        online: Mapping[str, OnlineRotation] | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.headers = dict(headers)
        self.online = dict(online or {})

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in memory of its own."""

    @abstractmethod
    def check_finite(self) -> None:
        """Raise InputError naming the first tensor with a NaN or an infinity."""

    def read_in_source_dtype(self, name: str) -> Tensor:
        """Read one tensor; a view that computes it rounds it to the dtype of the source."""
        return self.read(name)

    def residual(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., n] of the source model as the model seen here has them."""
        return hidden

    def read_block(self, prefix: str) -> dict[str, Tensor]:
        """All tensors below module `prefix`, by their name within it."""
        start = f"{prefix}."
        return {x.removeprefix(start): self.read(x) for x in self.headers if x.startswith(start)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, by name."""
        return {name: entry.shape for name, entry in self.headers.items()}


def computed(source: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    """Header of a tensor that a view computes from that of `source`; float64 is left unnamed."""
    return StoredTensor(source.shape, "F32" if dtype == torch.float32 else None)


class Reader(ModelReader):
    """A Hugging Face folder of safetensors files, in the dtype that they have."""

    def __init__(self, folder: Path) -> None:
        refuse_other_kinds(folder)
        stored = find_weights(folder)
        config = settle(_read_config(folder))
        self._stored_name = stored_names(config, stored.headers)
        self._file_of = stored.file_of
        headers = {name: stored.headers[x] for name, x in self._stored_name.items()}
        super().__init__(folder, config, headers)

    def weight_files(self) -> list[Path]:
        """The safetensors files, by name."""
        return sorted(set(self._file_of.values()))

    def read(self, name: str) -> Tensor:
        """One tensor, in the file's dtype, on the CPU, in memory of its own."""
        stored = self._stored_name[name]
        with safe_open(self._file_of[stored], framework="pt") as tensors:
            # A copy: pages of the mapped file must not stay with the tensor.
            tensor: Tensor = tensors.get_tensor(stored).clone()
        return tensor

    def check_finite(self) -> None:
        """Raise InputError naming the first tensor with a NaN or an infinity."""
        for name in self.headers:
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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} holds no {CONFIG}: it is not a Hugging Face model.")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): download the model again.") from error
    return config


def open_checkpoint(checkpoint: str | Path) -> Reader:
    """A mergequant checkpoint's folder; raises InputError if it is another model's."""
    reader = Reader(locate(checkpoint))
    if not is_mergequant(reader.config):
        raise InputError(
            f"{reader.folder} is not a mergequant checkpoint: quantize the model first."
        )
    return reader


def is_mergequant(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a mergequant checkpoint."""
    quantized = config.get("quantization_config") or {}
    return bool(quantized.get("quant_method") == QUANT_METHOD)

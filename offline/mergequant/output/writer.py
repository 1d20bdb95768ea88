"""Hugging Face folders: a lazy reader, and a writer that can be killed and continued."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergequant.errors import InputError
from mergequant.output.durable_files import write_durably, write_json
from mergequant.output.fingerprint import Fingerprint
from mergequant.output.unfinished_run import FOLDER, Staging
from mergequant_vllm.format import QUANT_METHOD, StoredTensor

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
REPORT = "quantization_report.jsonl"
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

logger = logging.getLogger("mergequant")


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
        hadamard: block of the rotation that a linear's weight expects of its input, by name within
            its block; a model as it is stored has none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hadamard: dict[str, int] = {}
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

    def weight_files(self) -> list[Path]:
        """The safetensors files, by name."""
        return sorted(set(self._file_of.values()))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, by name."""
        return {name: entry.shape for name, entry in self.stored.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, in its stored dtype, on the CPU, in memory of its own."""
        with safe_open(self._file_of[name], framework="pt") as tensors:
            # A copy: pages of the mapped file must not stay with the tensor.
            tensor: Tensor = tensors.get_tensor(name).clone()
        return tensor

    def read_in_source_dtype(self, name: str) -> Tensor:
        """As `read`; a view that computes its tensors rounds them to the dtype of the source."""
        return self.read(name)

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
    Use as a context manager: if no block is finished when it is left, or an InputError ends a run
    that continued none, all that was made is removed; else the finished blocks are kept, and
    `begin` with the same fingerprint finds them.

    Attributes:
        finished: how many blocks, from the first, need not be made; 0 before `begin`.
    """

    def __init__(self, output: Path, shards: int) -> None:
        self.output = output
        self.finished = 0
        self._staging = Staging(output, shards)
        self._made: list[Path] = []
        self._begun = False
        self._complete = False
        if output.exists() and not output.is_dir():
            raise InputError(f"Output {output} is a file: choose another name.")
        self._refuse_files()

    def _refuse_files(self) -> None:
        if self.output.is_dir():
            own = {FOLDER, *self._staging.published()}
            if any(path.name not in own for path in self.output.iterdir()):
                raise InputError(
                    f"Output folder {self.output} is not empty: choose another or remove it."
                )

    def __enter__(self) -> "Writer":
        self._made = [path for path in (self.output, *self.output.parents) if not path.exists()]
        try:
            self._staging.acquire()
        except OSError as error:
            self._remove_made()
            raise InputError(
                f"{self.output} cannot be written ({error}): choose another."
            ) from error
        try:
            self._refuse_files()  # another run may have ended since
        except InputError:
            self._leave()
            raise
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, InputError) and self._begun and not self.finished:
            self._staging.discard()  # the same input would end there again
        finished = self._leave()
        if finished and not isinstance(error, InputError):
            logger.warning(
                "%d of %d blocks are finished: run the same command again to continue, or remove "
                "%s to give up.",
                finished,
                self._staging.shards - 1,
                self._staging.folder,
            )

    def _leave(self) -> int:
        """Clean up what holds no finished block; returns how many blocks are left there."""
        left = 0 if self._complete else self._staging.finished()
        if not left:
            self._staging.remove()
            self._remove_made()
        self._staging.release()
        return left

    def _remove_made(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def begin(self, fingerprint: Fingerprint) -> None:
        """Continue the run of this fingerprint that the output holds, or begin it.

        Raises:
            InputError: the output holds finished blocks of a run that was begun otherwise.
        """
        self._staging.refuse_another(fingerprint)
        self._staging.take_back()
        self.finished = self._staging.resume(fingerprint)
        self._begun = True

    def decision(self) -> dict[str, Any]:
        """See `remember`; empty if nothing was decided yet."""
        return self._staging.decision()

    def remember(self, decision: dict[str, Any]) -> None:
        """Keep what was decided before the first block for a run that continues this one."""
        self._staging.remember(decision)

    def write_block(
        self, number: int, tensors: Mapping[str, Tensor], report: Sequence[dict[str, Any]]
    ) -> None:
        """Write block `number`, counted from 0, and its lines of the report: it is finished."""
        self.write_shard(number, tensors)
        self._staging.write_record(number, report)

    def read_block(self, number: int) -> dict[str, Tensor]:
        """The tensors of finished block `number`, by full name."""
        return load_file(self._staging.shard(number))

    def write_shard(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write shard `number`, counted from 0, atomically."""
        whole = dict(_in_memory_of_their_own(tensors))

        def write(path: Path) -> None:
            save_file(whole, path, metadata={"format": "pt"})
            path.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read

        write_durably(self._staging.shard(number), write)

    def headers(self) -> dict[str, StoredTensor]:
        """Shape and dtype of each tensor that was written, as the files of all shards say."""
        return {name: entry for file in self._shards() for name, entry in read_header(file).items()}

    def _shards(self) -> list[Path]:
        return [self._staging.shard(number) for number in range(self._staging.shards)]

    def finish(self, source: Reader, quantization_config: Mapping[str, Any]) -> None:
        """Write the report, index and config, copy the tokenizer, and move all into place."""
        folder = self._staging.folder
        records = (self._staging.record(number) for number in range(self._staging.shards - 1))
        lines = [json.dumps(line) + "\n" for record in records for line in record.report]
        (folder / REPORT).write_text("".join(lines))
        write_json(folder / INDEX, _index(self._shards()))
        copied = list(_copied_files(source.folder))
        for file in copied:
            shutil.copyfile(file, folder / file.name)
        write_json(folder / CONFIG, {**source.config, "quantization_config": quantization_config})
        # config.json makes the folder look finished: it is the last.
        files = [*self._shards(), folder / REPORT, folder / INDEX, *copied, folder / CONFIG]
        self._staging.publish([file.name for file in files])
        self._complete = True


def _in_memory_of_their_own(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Contiguous, on the CPU; linears behind one norm may share tensors, safetensors may not."""
    seen = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        memory = whole.untyped_storage().data_ptr()
        yield name, whole.clone() if memory in seen else whole
        seen.add(memory)


def _index(shards: Sequence[Path]) -> dict[str, Any]:
    """Content of `model.safetensors.index.json`, as the files' headers say."""
    weight_map = {name: file.name for file in shards for name in read_header(file)}
    size = 0
    for file in shards:
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        size += file.stat().st_size - 8 - header
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


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


def is_mergequant(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a mergequant checkpoint."""
    quantized = config.get("quantization_config") or {}
    return bool(quantized.get("quant_method") == QUANT_METHOD)

"""Which safetensors files hold a model's weights, and which of them counts for each tensor."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mergequant.errors import InputError
from mergequant_vllm.format import StoredTensor

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
# Some publishers store the same weights a second time under this name.
DUPLICATES = "consolidated*"
# Bytes of a number, by safetensors' name of its dtype.
DTYPE_BYTES = {"F64": 8, "I32": 4, "F32": 4, "BF16": 2, "F16": 2, "I8": 1}
_NUMBERED = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")

logger = logging.getLogger("mergequant")


@dataclass(frozen=True)
class StoredWeights:
    """Where a model's tensors are: the file of each, and its shape and dtype, by name."""

    file_of: Mapping[str, Path]
    headers: Mapping[str, StoredTensor]


def find_weights(folder: Path) -> StoredWeights:
    """Find a model's tensors as loaders find them.

    An index decides which file counts for a tensor that two have. Where files that it names are
    missing, and the whole model is beside it in one file, that file is read.

    Raises:
        InputError: there are none, a shard is missing or damaged, or two files have the same tensor
            and nothing says which counts.
    """
    files, named = _listed(folder)
    file_of: dict[str, Path] = {}
    headers: dict[str, StoredTensor] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if named.get(name, file.name) != file.name:
                continue
            if name in file_of:
                raise InputError(
                    f"Tensor {name!r} is in {file_of[name].name} and in {file.name} of {folder}, "
                    f"and no {INDEX} says which counts: remove the file that does not."
                )
            file_of[name], headers[name] = file, entry
    return StoredWeights(file_of, headers)


def _listed(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files to read, and the name of the one that counts for each tensor, if an index says."""
    whole, index = folder / WHOLE, folder / INDEX
    named = _weight_map(index) if index.is_file() else {}
    files = sorted(folder / name for name in set(named.values()))
    missing = [file for file in files if not file.is_file()]
    if missing and whole.is_file():
        logger.warning("%s names shards that are not there: %s is read instead", INDEX, WHOLE)
        return [whole], {}
    if not named:
        duplicates = set(folder.glob(f"{DUPLICATES}.safetensors"))
        files = sorted(set(folder.glob("*.safetensors")) - duplicates)
        if whole in files and any(_NUMBERED.search(file.name) for file in files):
            logger.warning("%s is read, and not the shards beside it: no index names them", WHOLE)
            return [whole], {}
        missing = _missing_numbers(files)
    if not files:
        raise InputError(
            f"{folder} holds no safetensors weights: convert the model with "
            "save_pretrained(..., safe_serialization=True)."
        )
    if missing:
        raise InputError(f"Shard {missing[0]} is missing: download the model again.")
    return files, named


def _missing_numbers(files: list[Path]) -> list[Path]:
    """Shards that are not there, of those whose names count them."""
    missing = []
    for file in files:
        if found := _NUMBERED.search(file.name):
            count, digits = int(found[2]), len(found[1])
            start = file.name[: found.start()]
            names = [
                f"{start}-{x:0{digits}}-of-{found[2]}.safetensors" for x in range(1, count + 1)
            ]
            missing += [file.parent / name for name in names]
    return sorted(set(missing) - set(files))


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

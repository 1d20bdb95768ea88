"""What a run was begun with: it is continued with the same, or not at all."""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue

import mergequant_vllm
from mergequant.options import Options
from mergequant_vllm.format import FORMAT_VERSION

_HASHED_AT_ONCE = 4  # files; more would compete for one disk


class Fingerprint(BaseModel):
    """All that decides the bytes of a checkpoint, but for the processor it is made on.

    Attributes:
        versions: of the libraries whose arithmetic and tokenizers are used, by package.
        options: see `Options`, by name.
        config_sha256: of the source model's configuration.
        weights_sha256: of each weight file of the source model, by name.
        calibration_sha256: of the token windows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    versions: dict[str, str]
    options: dict[str, JsonValue]
    config_sha256: str
    weights_sha256: dict[str, str]
    calibration_sha256: str

    def difference(self, given: "Fingerprint") -> str | None:
        """What this run was begun with and `given` differs in, as a phrase; None if they agree.

        Causes come before what follows from them: another seed also gives other windows.
        """
        return next(self._differences(given), None)

    def _differences(self, given: "Fingerprint") -> Iterator[str]:
        for name, ours, theirs in unequal(self.options, given.options):
            yield f"--{name.replace('_', '-')} {ours}, not {theirs}"
        for name, ours, theirs in unequal(self.versions, given.versions):
            yield f"{name} {ours}, not {theirs}"
        if self.format_version != given.format_version:
            yield f"format version {self.format_version}, not {given.format_version}"
        if self.config_sha256 != given.config_sha256:
            yield "another config.json of the model"
        for name, ours, theirs in unequal(self.weights_sha256, given.weights_sha256):
            yield f"other weights in {name} ({_short(ours)}, not {_short(theirs)})"
        ours, theirs = self.calibration_sha256, given.calibration_sha256
        if ours != theirs:
            yield f"other calibration text ({_short(ours)}, not {_short(theirs)})"


def fingerprint(
    config: Mapping[str, Any], files: Sequence[Path], options: Options, calibration_sha256: str
) -> Fingerprint:
    """The fingerprint of a run.

    Args:
        config: the source model's `config.json`.
        files: its weight files.
        options: as they were given; what they leave to be measured follows from the rest.
        calibration_sha256: of the token windows.
    """
    return Fingerprint(
        format_version=FORMAT_VERSION,
        versions=library_versions(),
        options=options.model_dump(mode="json"),
        config_sha256=config_sha256(config),
        weights_sha256=weights_sha256(files),
        calibration_sha256=calibration_sha256,
    )


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic and tokenizers are used, by package."""
    return versions_of("torch", "transformers", "compressed-tensors")


def versions_of(*libraries: str) -> dict[str, str]:
    """This release and those of installed `libraries`, by package."""
    versions = {name: importlib.metadata.version(name) for name in libraries}
    return {"mergequant-vllm": mergequant_vllm.__version__, **versions}


def config_sha256(config: Mapping[str, Any]) -> str:
    """Hash of what a `config.json` says, however it is laid out; in hexadecimal."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def weights_sha256(files: Sequence[Path]) -> dict[str, str]:
    """Hash of each weight file, by name.

    Files are hashed whole: it costs 1 to 3 seconds a GB, and quantizing minutes a GB. Sizes,
    headers and sampled pages would not see an adapter merged into a few of the matrices.
    """
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        hashes = list(pool.map(file_sha256, files))
    return {file.name: value for file, value in zip(files, hashes, strict=True)}


def file_sha256(file: Path) -> str:
    """sha256 of a whole file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def unequal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of each entry that differs; None where one has no such entry."""
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield name, ours.get(name), theirs.get(name)


def _short(sha256: str | None) -> str:
    return "none" if sha256 is None else f"sha256 {sha256[:12]}"

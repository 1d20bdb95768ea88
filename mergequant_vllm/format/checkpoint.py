"""The whole `quantization_config` of a checkpoint, and reading it."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Final, Literal, Self

from pydantic import Field, JsonValue, ValidationError, model_validator

from mergequant_vllm.format.linear import FormatError, LinearFormat, Strict
from mergequant_vllm.format.targets import Target, form_of, matches

QUANT_METHOD: Final = "mergequant"
FORMAT_VERSION: Final = 2
BLOCK: Final = "{block}"  # stands for the block's number in a tensor's or module's name


class LinearEntry(Strict):
    """One linear of the model, in each block if its name has `{block}`.

    Attributes:
        shape: (out, in) of the source model's weight.
        bias: whether it has one.
        norm: full name, with `{block}`, of the norm that it reads; None: it reads something else.
    """

    shape: tuple[int, int]
    bias: bool = False
    norm: str | None = None


class Provenance(Strict):
    """What made the checkpoint: enough to make it again."""

    options: dict[str, JsonValue]
    versions: dict[str, str]
    calibration_sha256: str


class CheckpointFormat(Strict):
    """The `quantization_config` of `config.json`.

    Attributes:
        block: name of a decoder block's module, with `{block}` for its number.
        blocks: how many there are.
        targets: which linears are quantized, and how; later ones override earlier ones.
        linears: every linear that could be, by full name with `{block}`.
        tensors: shapes of all tensors that belong to no linear, `{block}` for each block.
        provenance: what made the checkpoint.
    """

    quant_method: Literal["mergequant"]
    format_version: Literal[2]
    packing: Literal["pack-quantized"] = "pack-quantized"
    block: str
    blocks: int = Field(ge=1)
    targets: list[Target]
    linears: dict[str, LinearEntry]
    tensors: dict[str, list[int]]
    provenance: Provenance

    @model_validator(mode="after")
    def _targets_fit(self) -> Self:
        for target in self.targets:
            if not any(matches(target.pattern, name) for name, _ in self.entries()):
                raise ValueError(f"target {target.pattern!r} matches no linear of the model")
        for name, linear in self.outer.items():
            if linear.static is not None:
                raise ValueError(f"{name}: nothing carries the steps of a static input there")
        _refuse_different_inputs(self.quantized)
        return self

    def entries(self) -> Iterator[tuple[str, LinearEntry]]:
        """Every linear of the model with its full name, block by block, the head last."""
        inside = {name: entry for name, entry in self.linears.items() if BLOCK in name}
        for number in range(self.blocks):
            for name, entry in inside.items():
                norm = None if entry.norm is None else entry.norm.replace(BLOCK, str(number))
                yield name.replace(BLOCK, str(number)), entry.model_copy(update={"norm": norm})
        yield from ((name, entry) for name, entry in self.linears.items() if BLOCK not in name)

    @cached_property
    def quantized(self) -> dict[str, LinearFormat]:
        """Every quantized linear by its full name, block by block, the head last."""
        return dict(self._resolve())

    def _resolve(self) -> Iterator[tuple[str, LinearFormat]]:
        for name, entry in self.entries():
            form = form_of(self.targets, name)
            if form is None:
                continue
            try:
                linear = LinearFormat(
                    entry.shape, entry.bias, entry.norm, form.weight, form.input, form.output_offset
                )
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            yield name, linear

    def block_linears(self, number: int) -> dict[str, LinearFormat]:
        """The quantized linears of block `number`, by name within it."""
        prefix = f"{self.block.replace(BLOCK, str(number))}."
        return {
            name.removeprefix(prefix): linear
            for name, linear in self.quantized.items()
            if name.startswith(prefix)
        }

    @property
    def outer(self) -> dict[str, LinearFormat]:
        """The quantized linears outside the blocks (the head), by full name."""
        return {
            x: self.quantized[x] for x in self.linears if BLOCK not in x and x in self.quantized
        }


def _refuse_different_inputs(linears: Mapping[str, LinearFormat]) -> None:
    """Raise ValueError where quantized readers of one norm do not read it alike."""
    first: dict[str, str] = {}
    static = {linear.norm for linear in linears.values() if linear.static is not None}
    for name, linear in linears.items():
        if linear.norm is None or linear.norm not in static:
            continue
        other = first.setdefault(linear.norm, name)
        if linears[other].input != linear.input:
            raise ValueError(f"{other} and {name} read {linear.norm} in different ways")


def parse(config: Mapping[str, Any]) -> CheckpointFormat:
    """Read a `quantization_config`; raises FormatError with one sentence that names the fault."""
    method = config.get("quant_method")
    if method != QUANT_METHOD:
        raise FormatError(f"quantization_config has quant_method {method!r}, not {QUANT_METHOD!r}.")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        older = isinstance(version, int) and version < FORMAT_VERSION
        remedy = (
            "quantize again" if older else "install the release that wrote it, or quantize again"
        )
        raise FormatError(
            f"The checkpoint has mergequant format version {version!r}; this mergequant-vllm reads "
            f"version {FORMAT_VERSION}: {remedy}."
        )
    try:
        return CheckpointFormat.model_validate(dict(config))
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(str(part) for part in fault["loc"]) or "targets"
        raise FormatError(
            f"quantization_config field {field!r} is wrong ({fault['msg']}): "
            "quantize the model again, or restore the config.json that was written with it."
        ) from error

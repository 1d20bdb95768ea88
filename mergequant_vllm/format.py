"""THE CONTRACT between the quantizer, which writes it, and the server, which reads it.

A checkpoint is a Hugging Face folder whose `config.json` carries a `quantization_config` (class
`CheckpointFormat`) and whose safetensors hold, for each quantized linear `P`:

| tensor                | shape           | dtype    | meaning                                   |
|-----------------------|-----------------|----------|-------------------------------------------|
| `P.weight_packed`     | [out, words(K)] | int32    | codes + 2^(b-1), see `packing`            |
| `P.weight_scale`      | [out, groups]   | bfloat16 | weight step of each channel, or group     |
| `P.weight_zero_point` | [out, groups]   | int8     | asymmetric only: in the codes' range      |
| `P.bias`              | [out]           | floating | only where the source model has one       |
| `P.input_index`       | [K]             | int32    | static, reconstructed: gather of channels |
| `P.input_offset`      | [K]             | float32  | static, staggered: added before rounding  |
| `P.input_clip`        | [1]             | float32  | dynamic: clip ratio of the token step     |

K is `columns` where the input was reconstructed (paper 4.2: strong channels repeated, others
dropped, and padding, whose codes equal the zero point), and the source model's `in` elsewhere;
groups is 1, or ceil(K / group_size). The linears that read one norm hold equal copies of
`input_index` and `input_offset`.

A static linear needs no step: it lives in the norm's multiplier, stored as norm / s, and in the
weight, quantized as W * s (paper 4.1, Eq. 4-5). All other tensors of the model are listed with
their shapes under `tensors`, so that a missing, extra or misshapen one is found by reading the
headers alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from mergequant_vllm.packing import STREAM_CODES, words_per_row

QUANT_METHOD: Final = "mergequant"
FORMAT_VERSION: Final = 1
BLOCK = "{block}"  # stands for the block's number in a tensor's or module's name


class FormatError(ValueError):
    """A checkpoint that breaks the contract; the message is one sentence for the user."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LinearFormat(_Strict):
    """How one linear of every block, or the head, is stored and what its activations are.

    Attributes:
        shape: (out, in) of the source model's weight.
        group_size: input channels that share a weight step; None: one step per output channel.
        zero_points: weight codes are asymmetric.
        activations: `static`: per-channel steps folded into `norm`; `dynamic`: per token.
        norm: the norm, named within its block, whose multiplier carries 1/s; static only.
        columns: K after reconstruction; None: the input is read as it is; static only.
        offsets: rounding offsets are stored (staggered rounding); static only.
        hadamard: block of the online rotation of the input, a power of two; dynamic only.
        bias: whether the linear has one.
    """

    shape: tuple[int, int]
    weight_bits: Literal[3, 4, 8] = 4
    group_size: int | None = Field(default=None, ge=STREAM_CODES)
    zero_points: bool = False
    activation_bits: Literal[4, 8] = 4
    activations: Literal["static", "dynamic"]
    norm: str | None = None
    columns: int | None = Field(default=None, ge=1)
    offsets: bool = False
    hadamard: int | None = Field(default=None, ge=2)
    bias: bool = False

    @property
    def in_features(self) -> int:
        """K: columns of the stored weight."""
        return self.columns or self.shape[1]

    @property
    def groups(self) -> int:
        """Weight steps of an output channel; the last group may be short."""
        return 1 if self.group_size is None else -(-self.in_features // self.group_size)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        static = self.activations == "static"
        if static != (self.norm is not None):
            raise ValueError("static activations name their norm, dynamic ones have none")
        if not static and (self.columns is not None or self.offsets):
            raise ValueError("reconstruction (columns, offsets) is for static activations")
        if static and self.hadamard is not None:
            raise ValueError("the online rotation (hadamard) is for dynamic activations")
        if self.hadamard is not None and (
            self.hadamard & (self.hadamard - 1) or self.in_features % self.hadamard
        ):
            raise ValueError(
                f"hadamard block {self.hadamard} must be a power of two that divides "
                f"{self.in_features} input channels"
            )
        if self.group_size is not None and self.group_size % STREAM_CODES:
            raise ValueError(f"group_size must be a multiple of {STREAM_CODES}")
        return self

    def input_format(self) -> tuple[object, ...]:
        """All that linears must share for a server to merge them into one."""
        shared = self.model_dump(exclude={"shape", "bias"})
        return (self.shape[1], *shared.values())


class Provenance(_Strict):
    """What made the checkpoint: enough to make it again."""

    options: dict[str, JsonValue]
    versions: dict[str, str]
    calibration_sha256: str


class CheckpointFormat(_Strict):
    """The `quantization_config` of `config.json`.

    Attributes:
        block: name of a decoder block's module, with `{block}` for its number.
        linears: every quantized linear of a block, named within it.
        outer: quantized linears outside the blocks (the head), by full name; dynamic.
        tensors: shapes of all tensors that are stored as they are, `{block}` for each block.
    """

    quant_method: Literal["mergequant"]
    format_version: Literal[1]
    packing: Literal["pack-quantized"] = "pack-quantized"
    block: str
    blocks: int = Field(ge=1)
    linears: dict[str, LinearFormat]
    outer: dict[str, LinearFormat] = Field(default_factory=dict)
    tensors: dict[str, list[int]]
    provenance: Provenance

    @model_validator(mode="after")
    def _outer_linears_read_no_migrated_norm(self) -> Self:
        if any(linear.activations != "dynamic" for linear in self.outer.values()):
            raise ValueError("linears outside the blocks have dynamic activations")
        return self

    def linear_names(self) -> Iterator[tuple[str, LinearFormat]]:
        """Every quantized linear of the model with its full name, block by block, the head last."""
        for number in range(self.blocks):
            for name, linear in self.linears.items():
                yield f"{self.block.format(block=number)}.{name}", linear
        yield from self.outer.items()


@dataclass(frozen=True)
class StoredTensor:
    """Shape and safetensors dtype of a tensor on disk; `dtype` None admits any floating type."""

    shape: tuple[int, ...]
    dtype: Literal["I32", "I8", "BF16", "F32"] | None


def parse(config: Mapping[str, Any]) -> CheckpointFormat:
    """Read a `quantization_config`; raises FormatError with one sentence that names the fault."""
    method = config.get("quant_method")
    if method != QUANT_METHOD:
        raise FormatError(f"quantization_config has quant_method {method!r}, not {QUANT_METHOD!r}.")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"The checkpoint has mergequant format version {version!r}; this mergequant-vllm reads "
            f"version {FORMAT_VERSION}: install the release that wrote it, or quantize again."
        )
    try:
        return CheckpointFormat.model_validate(dict(config))
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(str(part) for part in fault["loc"])
        raise FormatError(
            f"quantization_config field {field!r} is wrong ({fault['msg']}): "
            "quantize the model again, or restore the config.json that was written with it."
        ) from error


def stored_tensors(linear: LinearFormat) -> dict[str, StoredTensor]:
    """The tensors of one quantized linear, by suffix."""
    out_features = linear.shape[0]
    words = words_per_row(linear.in_features, linear.weight_bits)
    tensors = {
        "weight_packed": StoredTensor((out_features, words), "I32"),
        "weight_scale": StoredTensor((out_features, linear.groups), "BF16"),
    }
    if linear.zero_points:
        tensors["weight_zero_point"] = StoredTensor((out_features, linear.groups), "I8")
    if linear.bias:
        tensors["bias"] = StoredTensor((out_features,), None)
    if linear.columns is not None:
        tensors["input_index"] = StoredTensor((linear.columns,), "I32")
    if linear.offsets:
        tensors["input_offset"] = StoredTensor((linear.in_features,), "F32")
    if linear.activations == "dynamic":
        tensors["input_clip"] = StoredTensor((1,), "F32")
    return tensors


def expected_tensors(checkpoint: CheckpointFormat) -> dict[str, StoredTensor]:
    """Every tensor that the checkpoint's files must hold, by full name."""
    expected = {
        f"{prefix}.{suffix}": stored
        for prefix, linear in checkpoint.linear_names()
        for suffix, stored in stored_tensors(linear).items()
    }
    for pattern, shape in checkpoint.tensors.items():
        numbers = range(checkpoint.blocks) if BLOCK in pattern else range(1)
        for number in numbers:
            expected[pattern.replace(BLOCK, str(number))] = StoredTensor(tuple(shape), None)
    return expected


def check_tensors(checkpoint: CheckpointFormat, found: Mapping[str, StoredTensor]) -> None:
    """Compare the tensors `found` in the files' headers with the contract.

    Raises:
        FormatError: names the first missing, extra, misshapen or mistyped tensor and the remedy.
    """
    expected = expected_tensors(checkpoint)
    remedy = "copy the checkpoint again, or quantize the model again."
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise FormatError(f"Tensor {missing[0]!r} is missing ({len(missing)} in all): {remedy}")
    extra = sorted(found.keys() - expected.keys())
    if extra:
        raise FormatError(
            f"Tensor {extra[0]!r} does not belong in the checkpoint ({len(extra)} in all): {remedy}"
        )
    for name, stored in expected.items():
        if found[name].shape != stored.shape:
            raise FormatError(
                f"Tensor {name!r} has shape {list(found[name].shape)}, "
                f"not {list(stored.shape)}: {remedy}"
            )
        if stored.dtype is not None and found[name].dtype != stored.dtype:
            raise FormatError(
                f"Tensor {name!r} has dtype {found[name].dtype}, not {stored.dtype}: {remedy}"
            )

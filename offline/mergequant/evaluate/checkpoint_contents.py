"""`mergequant inspect`: what a checkpoint stores, read from its headers and clip ratios alone."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergequant.model.reader import Reader, locate, open_checkpoint
from mergequant.model.weight_files import DTYPE_BYTES
from mergequant_vllm.format import (
    CheckpointFormat,
    LinearFormat,
    StoredTensor,
    check_tensors,
    expected_tensors,
    parse,
    stored_tensors,
)


@dataclass(frozen=True)
class LinearContents:
    """One stored linear.

    Attributes:
        name: its full name.
        shape: (out, in) of the source model's weight.
        weight_bits: width of a weight code.
        group_size: columns that share a weight step; None: one step, or segments.
        segments: lengths of the runs of columns that share a weight step, or None.
        zero_points: weight codes have zero points.
        activations: `static` or `dynamic`.
        activation_bits: width of an activation code.
        activation_zero_points: activation codes have zero points.
        columns: K if it is reconstructed, else None.
        norm: the norm that carries the steps of a static input.
        clip: ratio of a dynamic input's step.
        bytes: what is stored.
        compression: 16-bit over stored bytes.
    """

    name: str
    shape: tuple[int, int]
    weight_bits: int
    group_size: int | None
    segments: tuple[int, ...] | None
    zero_points: bool
    activations: str
    activation_bits: int
    activation_zero_points: bool
    columns: int | None
    norm: str | None
    clip: float | None
    bytes: int
    compression: float


@dataclass(frozen=True)
class Contents:
    """One checkpoint: its quantized linears, names of those that are not, and sizes in bytes.

    `bytes_16_bit` is what 16 bits a parameter would take.
    """

    folder: str
    format_version: int
    linears: list[LinearContents]
    plain: list[str]
    bytes_total: int
    bytes_16_bit: int
    compression: float
    provenance: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


def inspect_checkpoint(checkpoint: str | Path) -> Contents:
    """Contents of a checkpoint; raises InputError or FormatError if it is not a whole one."""
    reader = open_checkpoint(checkpoint)
    contract = parse(reader.config["quantization_config"])
    check_tensors(contract, reader.headers)
    linears = [_linear(reader, name, linear) for name, linear in contract.quantized.items()]
    total = sum(_size(entry) for entry in reader.headers.values())
    plain = _bytes_16_bit(contract)
    return Contents(
        folder=str(reader.folder),
        format_version=contract.format_version,
        linears=linears,
        plain=[name for name, _ in contract.entries() if name not in contract.quantized],
        bytes_total=total,
        bytes_16_bit=plain,
        compression=plain / total,
        provenance=contract.provenance.model_dump(mode="json"),
    )


def sizes(checkpoint: str | Path, source: str | Path) -> str:
    """How large a checkpoint's weights are, and beside its source model's, in words."""
    total, before = (
        sum(file.stat().st_size for file in Reader(locate(x)).weight_files()) / 1e6
        for x in (checkpoint, source)
    )
    return f"{total:.1f} MB, {total / before:.2f} of the source's {before:.1f} MB"


def _linear(reader: Reader, name: str, linear: LinearFormat) -> LinearContents:
    stored = sum(_size(reader.headers[f"{name}.{suffix}"]) for suffix in stored_tensors(linear))
    clip = None
    if linear.dynamic is not None:
        clip = round(float(reader.read(f"{name}.input_clip")), 4)
    return LinearContents(
        name=name,
        shape=linear.shape,
        weight_bits=linear.weight.bits,
        group_size=linear.weight.group_size,
        segments=linear.weight.segments,
        zero_points=linear.weight.zero_points,
        activations=linear.input.kind,
        activation_bits=linear.input.bits,
        activation_zero_points=linear.input.zero_points,
        columns=linear.columns,
        norm=linear.norm if linear.static is not None else None,
        clip=clip,
        bytes=stored,
        compression=_linear_bytes_16_bit(linear) / stored,
    )


def _linear_bytes_16_bit(linear: LinearFormat) -> int:
    out_features, in_features = linear.shape
    return 2 * (out_features * in_features + (out_features if linear.bias else 0))


def _bytes_16_bit(contract: CheckpointFormat) -> int:
    quantized = contract.quantized
    others = (
        entry.shape
        for name, entry in expected_tensors(contract).items()
        if name.rpartition(".")[0] not in quantized
    )
    linears = sum(_linear_bytes_16_bit(linear) for linear in quantized.values())
    return linears + 2 * sum(math.prod(shape) for shape in others)


def _size(entry: StoredTensor) -> int:
    return DTYPE_BYTES.get(str(entry.dtype), 1) * math.prod(entry.shape)


def as_table(contents: Contents) -> str:
    """Contents as lines of text, one a linear."""
    name_width = max((len(x.name) for x in contents.linears), default=6)
    lines = [
        f"{contents.folder}: mergequant format {contents.format_version}, "
        f"{_mebibytes(contents.bytes_total)} against {_mebibytes(contents.bytes_16_bit)} "
        f"in 16 bits ({contents.compression:.2f}x)",
        f"{'linear':<{name_width}}  {'out x in':>13}  bits   activations    clip  weight steps  "
        f"{'KiB':>7}  ratio",
    ]
    for x in contents.linears:
        clip = "-" if x.clip is None else f"{x.clip:.2f}"
        kind = f"{x.activations}{', zero' if x.activation_zero_points else ''}"
        lines.append(
            f"{x.name:<{name_width}}  {x.shape[0]:>6} x{x.shape[1]:>5}  "
            f"W{x.weight_bits}A{x.activation_bits}   {kind:<13}  {clip:<4}  {_steps(x):<12}  "
            f"{x.bytes / 1024:>7.1f}  {x.compression:.2f}x"
        )
    if contents.plain:
        lines.append(f"not quantized: {', '.join(contents.plain)}")
    return "\n".join(lines)


def _steps(linear: LinearContents) -> str:
    """How many weight steps an output channel has along K, and where there are zero points."""
    steps = "one"
    if linear.group_size is not None:
        steps = f"groups {linear.group_size}"
    elif linear.segments is not None:
        steps = f"{len(linear.segments)} segments"
    return f"{steps}{', zero' if linear.zero_points else ''}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"

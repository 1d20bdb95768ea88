"""`mergequant inspect`: what a checkpoint stores, read from its headers and clip ratios alone."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mergequant.errors import InputError
from mergequant.model.reader import Reader, is_mergequant, locate
from mergequant_vllm.format import (
    CheckpointFormat,
    LinearFormat,
    StoredTensor,
    check_tensors,
    expected_tensors,
    parse,
    stored_tensors,
)

_BYTES = {"I32": 4, "F32": 4, "BF16": 2, "F16": 2, "F64": 8}


@dataclass(frozen=True)
class LinearSummary:
    """One stored linear. `columns`: K if reconstructed; `compression`: 16-bit over stored bytes."""

    name: str
    shape: tuple[int, int]
    weight_bits: int
    group_size: int | None
    zero_points: bool
    activation_bits: int
    activations: str
    columns: int | None
    norm: str | None
    clip: float | None
    bytes: int
    compression: float


@dataclass(frozen=True)
class Summary:
    """One checkpoint. Sizes are in bytes; `bytes_16_bit` is what 16 bits a parameter would take."""

    folder: str
    format_version: int
    linears: list[LinearSummary]
    bytes_total: int
    bytes_16_bit: int
    compression: float
    provenance: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def inspect_checkpoint(checkpoint: str | Path) -> Summary:
    """Summarise a checkpoint; raises InputError or FormatError if it is not a whole one."""
    reader = Reader(locate(checkpoint))
    if not is_mergequant(reader.config):
        raise InputError(
            f"{reader.folder} is not a mergequant checkpoint: quantize the model first."
        )
    contract = parse(reader.config["quantization_config"])
    check_tensors(contract, reader.stored)
    linears = [_linear(reader, name, linear) for name, linear in contract.linear_names()]
    total = sum(_size(entry) for entry in reader.stored.values())
    plain = _bytes_16_bit(contract)
    return Summary(
        folder=str(reader.folder),
        format_version=contract.format_version,
        linears=linears,
        bytes_total=total,
        bytes_16_bit=plain,
        compression=plain / total,
        provenance=contract.provenance.model_dump(mode="json"),
    )


def _linear(reader: Reader, name: str, linear: LinearFormat) -> LinearSummary:
    stored = sum(_size(reader.stored[f"{name}.{suffix}"]) for suffix in stored_tensors(linear))
    dynamic = linear.activations == "dynamic"
    return LinearSummary(
        name=name,
        shape=linear.shape,
        weight_bits=linear.weight_bits,
        group_size=linear.group_size,
        zero_points=linear.zero_points,
        activation_bits=linear.activation_bits,
        activations=linear.activations,
        columns=linear.columns,
        norm=linear.norm,
        clip=round(float(reader.read(f"{name}.input_clip")), 4) if dynamic else None,
        bytes=stored,
        compression=_linear_bytes_16_bit(linear) / stored,
    )


def _linear_bytes_16_bit(linear: LinearFormat) -> int:
    out_features, in_features = linear.shape
    return 2 * (out_features * in_features + (out_features if linear.bias else 0))


def _bytes_16_bit(contract: CheckpointFormat) -> int:
    quantized = dict(contract.linear_names())
    others = (
        entry.shape
        for name, entry in expected_tensors(contract).items()
        if name.rpartition(".")[0] not in quantized
    )
    linears = sum(_linear_bytes_16_bit(linear) for linear in quantized.values())
    return linears + 2 * sum(math.prod(shape) for shape in others)


def _size(entry: StoredTensor) -> int:
    return _BYTES.get(str(entry.dtype), 1) * math.prod(entry.shape)


def as_table(summary: Summary) -> str:
    """For people."""
    name_width = max(len(x.name) for x in summary.linears)
    lines = [
        f"{summary.folder}: mergequant format {summary.format_version}, "
        f"{_mebibytes(summary.bytes_total)} against {_mebibytes(summary.bytes_16_bit)} "
        f"in 16 bits ({summary.compression:.2f}x)",
        f"{'linear':<{name_width}}  {'out x in':>13}  bits   activations  clip    KiB     ratio",
    ]
    for x in summary.linears:
        clip = "-" if x.clip is None else f"{x.clip:.2f}"
        lines.append(
            f"{x.name:<{name_width}}  {x.shape[0]:>6} x{x.shape[1]:>5}  "
            f"W{x.weight_bits}A{x.activation_bits}   {x.activations:<11}  {clip:<4}  "
            f"{x.bytes / 1024:>7.1f}  {x.compression:.2f}x"
        )
    return "\n".join(lines)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"

"""The contract of a checkpoint that is going to be written, known before its first block."""

from collections.abc import Iterator, Mapping
from typing import Any

from mergequant.model.architecture import Architecture
from mergequant.model.shapes import block_tensors, has_bias, linear_shape, outer_tensors
from mergequant.options import Options
from mergequant.output.fingerprint import library_versions
from mergequant_vllm.format import (
    BLOCK,
    FORMAT_VERSION,
    QUANT_METHOD,
    CheckpointFormat,
    LinearEntry,
    LinearForm,
    Provenance,
    shortest_targets,
)


def checkpoint_format(
    architecture: Architecture,
    config: Mapping[str, Any],
    options: Options,
    forms: Mapping[str, LinearForm | None],
    calibration_sha256: str,
) -> CheckpointFormat:
    """The contract of the checkpoint that is going to be written."""
    linears = dict(_entries(architecture, config))
    named = {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    tensors = {
        name: list(shape)
        for name, shape in outer_tensors(architecture, config).items()
        if name not in named
    }
    for name, shape in block_tensors(architecture, config).items():
        if f"{architecture.block}.{name}" not in named:
            tensors[f"{architecture.block}.{name}"] = list(shape)
    return CheckpointFormat(
        quant_method=QUANT_METHOD,
        format_version=FORMAT_VERSION,
        block=architecture.block,
        blocks=int(config["num_hidden_layers"]),
        targets=shortest_targets(forms, _roles(architecture, forms)),
        linears=linears,
        tensors=tensors,
        provenance=Provenance(
            options=options.model_dump(mode="json"),
            versions=library_versions(),
            calibration_sha256=calibration_sha256,
        ),
    )


def _entries(
    architecture: Architecture, config: Mapping[str, Any]
) -> Iterator[tuple[str, LinearEntry]]:
    """Every linear of the model, by full name with `{block}`."""
    assert BLOCK in architecture.block
    for readers in architecture.readers():
        norm = None if readers.norm is None else f"{architecture.block}.{readers.norm.name}"
        for linear in readers.linears:
            yield (
                f"{architecture.block}.{linear.name}",
                LinearEntry(
                    shape=linear_shape(architecture, linear, config),
                    bias=has_bias(linear, config),
                    norm=norm,
                ),
            )
    head = architecture.head.name
    shape = outer_tensors(architecture, config).get(f"{head}.weight")
    if shape is not None:
        bias = has_bias(architecture.head, config)
        yield head, LinearEntry(shape=(shape[0], shape[1]), bias=bias)


def _roles(architecture: Architecture, forms: Mapping[str, object]) -> dict[str, str]:
    """What each linear is called with `{block}` for its block's number, by full name."""
    inside = [linear.name for linear in architecture.linears]
    roles = {}
    for name in forms:
        role = next((x for x in inside if name.endswith(f".{x}")), None)
        roles[name] = name if role is None else f"{architecture.block}.{role}"
    return roles

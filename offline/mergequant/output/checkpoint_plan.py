"""The contract of what `quantize` is going to write, known before the first block is read."""

from collections.abc import Mapping

from mergequant.errors import InputError
from mergequant.model.architecture import (
    Architecture,
    block_tensors,
    has_bias,
    linear_shape,
    outer_tensors,
)
from mergequant.model.rotated_reader import online_hadamards
from mergequant.options import Options
from mergequant.output.fingerprint import library_versions
from mergequant.quantizer.head import BITS, head_format
from mergequant_vllm.format import (
    BLOCK,
    FORMAT_VERSION,
    QUANT_METHOD,
    CheckpointFormat,
    LinearFormat,
    Provenance,
)

_TILE, _NARROW_TILE, _NARROW = 128, 16, 1024
_ROUNDING = 1e-6  # channels; K / n - 1 is given as a float


def checkpoint_format(
    config: Mapping[str, object],
    architecture: Architecture,
    options: Options,
    calibration_sha256: str,
) -> CheckpointFormat:
    """The contract of the checkpoint that `quantize` writes."""
    linears = {}
    hadamards = online_hadamards(architecture, config, options.rotation, options.hadamard_block)
    for stage in architecture.stages():
        static = stage.norm is not None and options.activations == "static"
        for linear in stage.linears:
            linears[linear.name] = linear_format(
                options,
                linear_shape(architecture, linear, config),
                norm=stage.norm.name if static and stage.norm else None,
                bias=has_bias(linear, config),
                hadamard=hadamards.get(linear.name),
            )
    quantized = {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    outer = outer_tensors(architecture, config)
    head = f"{architecture.head.name}.weight"
    outer_linears = {}
    if options.head_bits == BITS:
        vocabulary, hidden = outer.pop(head)
        outer_linears[architecture.head.name] = head_format((vocabulary, hidden))
    tensors = {name: list(shape) for name, shape in outer.items()}
    for name, shape in block_tensors(architecture, config).items():
        if name not in quantized:
            tensors[f"{architecture.block}.{name}"] = list(shape)
    assert BLOCK in architecture.block
    return CheckpointFormat(
        quant_method=QUANT_METHOD,
        format_version=FORMAT_VERSION,
        block=architecture.block,
        blocks=int(str(config["num_hidden_layers"])),
        linears=linears,
        outer=outer_linears,
        tensors=tensors,
        provenance=Provenance(
            options=options.model_dump(mode="json"),
            versions=library_versions(),
            calibration_sha256=calibration_sha256,
        ),
    )


def linear_format(
    options: Options,
    shape: tuple[int, int],
    *,
    norm: str | None,
    bias: bool,
    hadamard: int | None = None,
) -> LinearFormat:
    """How a linear of this shape is stored; static if it reads the migrated `norm`."""
    reconstructed = norm is not None and options.reconstruction != "none"
    return LinearFormat(
        shape=shape,
        weight_bits=options.weight_bits,
        group_size=options.group_size,
        zero_points=options.asymmetric,
        activation_bits=options.dynamic_bits if norm is None else options.static_bits,
        activations="dynamic" if norm is None else "static",
        norm=norm,
        columns=reconstructed_columns(options, shape[1]) if reconstructed else None,
        offsets=reconstructed and options.staggered,
        hadamard=hadamard,
        bias=bias,
    )


def reconstructed_columns(options: Options, channels: int) -> int:
    """K of the linears behind a reconstructed norm, one for all blocks.

    Raises:
        InputError: `pad` has no room to grow.
    """
    if options.reconstruction == "prune":
        return channels
    columns = padded_columns(options, channels)
    if columns <= channels:
        tile = tile_of(channels)
        least = (channels // tile + 1) * tile / channels - 1
        raise InputError(
            f"--reconstruction pad has no room: {channels} channels and "
            f"{options.max_extra_channels:.1%} more make no further tile of {tile}: "
            f"give --max-extra-channels {least:.3f} or more, or --reconstruction prune."
        )
    return columns


def padded_columns(options: Options, channels: int) -> int:
    """The longest K that `max_extra_channels` allows, in whole tiles; may be below `channels`."""
    tile = tile_of(channels)
    return int(channels * (1 + options.max_extra_channels) + _ROUNDING) // tile * tile


def tile_of(channels: int) -> int:
    """K is padded to what the GPU kernels work on; a narrow model runs anywhere, in small steps."""
    return _TILE if channels >= _NARROW else _NARROW_TILE

"""vLLM parameters in the contract's stored layout, and whether the loader filled them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
)

from mergequant_vllm.format import FormatError, LinearFormat
from mergequant_vllm.packing import codes_per_word, stored_bits, words_per_row

_REMEDY = "copy the checkpoint again, or quantize the model again."

# Suffixes of the stored tensors, which a layer keeps only until its kernel has prepared its own.
STORED = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "output_offset",
    "input_index",
    "input_offset",
    "input_clip",
)

# What no checkpoint holds: a parameter that keeps it was passed over by the loader.
_NO_ZERO_POINT = 1000
_NO_CHANNEL = -1


class SharedInputParameter(BasevLLMParameter):
    """A tensor of a linear's input, of which every merged linear brings an equal copy.

    Its loader is its own: vLLM's takes a fused linear's tensors for matrices that it must cut.
    """

    def __init__(self, data: Tensor) -> None:
        super().__init__(data=data, weight_loader=_take_whole)

    def take(self, loaded: Tensor) -> None:
        if self.data.is_meta:  # vLLM counts what it is going to load
            self._assert_and_load(loaded)
            return
        before = self.data.clone()
        self._assert_and_load(loaded)
        was_empty = bool((before == _NO_CHANNEL).all() or before.isnan().all())
        if not was_empty and not torch.equal(before, self.data):
            raise FormatError(
                "Linears that vLLM merges have different input_index or input_offset tensors: "
                "quantize the model again."
            )


def _take_whole(parameter: SharedInputParameter, loaded: Tensor, *_: Any, **__: Any) -> None:
    """Load the whole copy, whichever of the merged linears brings it."""
    parameter.take(loaded)


def create_parameters(
    layer: Any,
    form: LinearFormat,
    rows: int,
    in_features: int,
    parts: int,
    loader: Callable[..., None],
) -> None:
    """Register the stored tensors of one server linear on `layer`, empty.

    Every dtype is spelled out: vLLM loads models under the model's default dtype.

    Args:
        rows: N on this rank, merged linears together.
        in_features: K on this rank, after reconstruction.
        parts: how many of the checkpoint's linears are merged.
        loader: vLLM's weight loader.
    """
    bits = form.weight.bits
    per_word = codes_per_word(bits)
    packed = PackedvLLMParameter(
        data=torch.zeros(rows, words_per_row(in_features, bits), dtype=torch.int32),
        input_dim=1,
        output_dim=0,
        packed_dim=1,
        packed_factor=per_word if per_word.denominator > 1 else int(per_word),
        weight_loader=loader,
    )
    layer.register_parameter("weight_packed", packed)
    _create_weight_steps(layer, form, rows, in_features, loader)
    if form.output_offset is not None:
        constant = torch.full((rows,), torch.nan, dtype=torch.float32)
        layer.register_parameter(
            "output_offset",
            ChannelQuantScaleParameter(data=constant, output_dim=0, weight_loader=loader),
        )
    if form.static is None:
        clips = torch.full((parts,), torch.nan, dtype=torch.float32)
        layer.register_parameter(
            "input_clip", PerTensorScaleParameter(data=clips, weight_loader=loader)
        )
        return
    shared = {}
    if form.static.columns is not None:
        shared["input_index"] = torch.full((in_features,), _NO_CHANNEL, dtype=torch.int32)
    if form.static.offsets:
        shared["input_offset"] = torch.full((in_features,), torch.nan, dtype=torch.float32)
    for name, data in shared.items():
        layer.register_parameter(name, SharedInputParameter(data=data))


def _create_weight_steps(
    layer: Any, form: LinearFormat, rows: int, in_features: int, loader: Callable[..., None]
) -> None:
    size = form.weight.group_size
    groups = form.groups if size is None else -(-in_features // size)
    tensors = {"weight_scale": torch.full((rows, groups), torch.nan, dtype=torch.float32)}
    if form.weight.zero_points:
        tensors["weight_zero_point"] = torch.full((rows, groups), _NO_ZERO_POINT, dtype=torch.int16)
    for name, data in tensors.items():
        # Groups are cut with the input's shards; segments are never cut, see `linear`.
        parameter = (
            ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
            if size is None
            else GroupQuantScaleParameter(
                data=data, input_dim=1, output_dim=0, weight_loader=loader
            )
        )
        layer.register_parameter(name, parameter)


def fill_dummy(layer: Any, form: LinearFormat) -> None:
    """Fill the parameters with values that a quantizer might write, for `--load-format dummy`.

    vLLM's own dummy weights leave integers as they are allocated and draw steps and clip ratios
    that no checkpoint has.
    """
    codes = layer.weight_packed.data
    generator = torch.Generator(device=codes.device).manual_seed(0)
    codes.random_(-(2**31), 2**31 - 1, generator=generator)
    values = {"weight_scale": _dummy_step(form), "weight_zero_point": 0, "output_offset": 0.0}
    values |= {"input_offset": 0.0, "input_clip": 1.0}
    for name, value in values.items():
        if hasattr(layer, name):
            getattr(layer, name).data.fill_(value)
    if hasattr(layer, "input_index"):
        index = layer.input_index.data
        index.copy_(torch.arange(len(index), device=index.device) % form.shape[1])


def _dummy_step(form: LinearFormat) -> float:
    """A step by which random codes give outputs near one, as trained models have.

    Larger ones overflow, or end in exponentials that are slower for extreme numbers. It supposes
    norms such as a quantizer writes; vLLM's own dummy norms are tiny, and their codes 0.
    """
    weights = 2.0 ** stored_bits(form.weight.bits) / math.sqrt(12)  # evenly distributed
    # A norm carries 1 / s, and what it writes spreads over a quarter of the codes.
    inputs = 2.0 ** (form.input.bits - 3) if form.norm else 1.0
    return 1.0 / (math.sqrt(form.shape[1]) * weights * inputs)


def check_loaded(layer: Any, form: LinearFormat, prefix: str) -> None:
    """Find what the loader passed over, and values that no quantizer writes.

    Raises:
        FormatError: one sentence that names the tensor.
    """

    def refuse(name: str, fault: str) -> None:
        raise FormatError(f"{prefix}.{name} was not loaded in full or {fault}: {_REMEDY}")

    if not _is_finite(layer.weight_scale):
        refuse("weight_scale", "is not finite")
    if form.weight.zero_points:
        half = 2 ** (form.weight.bits - 1)
        zeros = layer.weight_zero_point.data
        if not bool(((zeros >= -half) & (zeros < half)).all()):
            refuse("weight_zero_point", f"is outside [{-half}, {half - 1}]")
    if form.output_offset is not None and not _is_finite(layer.output_offset):
        refuse("output_offset", "is not finite")
    if form.static is None:
        _check_clips(layer.input_clip.data, prefix, refuse)
        return
    if form.static.columns is not None:
        index = layer.input_index.data
        if not bool(((index >= 0) & (index < form.shape[1])).all()):
            refuse("input_index", f"names channels outside [0, {form.shape[1] - 1}]")
    if form.static.offsets and not _is_finite(layer.input_offset):
        refuse("input_offset", "is not finite")


def _check_clips(clips: Tensor, prefix: str, refuse: Callable[[str, str], None]) -> None:
    if not bool(((clips > 0) & (clips <= 1)).all()):
        refuse("input_clip", "is outside (0, 1]")
    if not bool((clips == clips[0]).all()):
        raise FormatError(
            f"The linears that vLLM merges into {prefix!r} have different clip ratios "
            f"{clips.tolist()}: quantize the model again."
        )


def _is_finite(parameter: Any) -> bool:
    return bool(torch.isfinite(parameter.data).all())

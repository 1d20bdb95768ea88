"""What the transforms in the weights need to know of channels, from the full-precision model.

R1 mixes channels of the residual whose variance is alike, once each token is divided by its size as
a norm does; it is measured where blocks meet. The inputs of o and down are divided by scales after
which no channel's rounding costs more than another's. How far outliers stand out is only reported.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergequant.calibration.statistics import outlier_ratio
from mergequant.methods.equalize import channel_scales, relative_energy
from mergequant.methods.rotate import group_count
from mergequant.model.architecture import Architecture, Linear, Readers
from mergequant.model.block import Block
from mergequant.model.channels import Channels
from mergequant.model.equalized_reader import equalized, shared_channels
from mergequant.model.rotated_reader import fixed_residual
from mergequant.model.shapes import widths
from mergequant.options import Options
from mergequant.quantizer.carried_steps import carried_steps
from mergequant.quantizer.decision import possible_rotations
from mergequant.quantizer.inputs.record import ClipSearch


class ChannelMeter:
    """Measures what `options` ask for, block by block of the plain model.

    Args:
        config: of the model.
    """

    def __init__(
        self, architecture: Architecture, config: Mapping[str, Any], options: Options
    ) -> None:
        self._architecture, self._config, self._options = architecture, config, options
        width = widths(config)["hidden"]
        rotated = set(possible_rotations(architecture, config, options)) - {"none"}
        graded = options.residual_rotation == "graded" and options.activations != "dynamic"
        turns = bool(rotated) and fixed_residual(architecture) is None
        self._graded = graded and turns and group_count(width) > 1
        self._carries = options.activations == "fully_static"
        self._shares = torch.zeros(width, dtype=torch.float64)
        self._scales: dict[str, Tensor] = {}
        self._outliers: dict[str, float] = {}

    @property
    def is_wanted(self) -> bool:
        """Whether anything is to be measured."""
        return self._graded or self._options.equalization or self._carries

    def advance(self, block: Block, batches: Sequence[Tensor]) -> list[Tensor]:
        """Measure what `block` reads and does; returns what it emits.

        Args:
            batches: hidden states [windows, length, n] each.
        """
        if self._graded:
            self._shares += variance_shares(batches).cpu()
        scaled = [
            linear
            for linear, _ in equalized(self._architecture)
            if not self._options.ignores(block.name_of(linear.name))
        ]
        carried = [x for x in scaled if self._carries_input_of(block, x)]
        scaled = [x for x in scaled if self._options.equalization and x not in carried]
        kept: dict[str, list[Tensor]] = {linear.name: [] for linear in carried}
        outputs, energy, largest = _run(block, scaled, self._behind_norms(), kept, batches)
        for linear in carried:
            steps = self._steps(block, linear, kept.pop(linear.name))
            self._scales[block.name_of(linear.name)] = steps.to("cpu", torch.float32)
        for name, scale in self._channel_scales(block, scaled, energy):
            self._scales[block.name_of(name)] = scale.to("cpu", torch.float32)
        for readers in self._behind_norms():
            ratio = outlier_ratio(largest[readers.linears[0].name])
            if ratio is not None:
                self._outliers |= {block.name_of(x.name): ratio for x in readers.linears}
        return outputs

    def _carries_input_of(self, block: Block, linear: Linear) -> bool:
        """Whether another linear carries the steps of what `linear` reads."""
        own = self._options.for_linear(block.name_of(linear.name))
        return own.activations == "fully_static"

    def _steps(self, block: Block, linear: Linear, inputs: Sequence[Tensor]) -> Tensor:
        """Steps of what `linear` reads, see `carried_steps`."""
        own = self._options.for_linear(block.name_of(linear.name))
        search = None
        if own.clipping == "adaptive":
            search = ClipSearch(own.lowest_clip, own.clip_points)
        weight = block.weight(linear.name)
        bits, weight_bits = own.static_bits, own.weight_bits
        return carried_steps(inputs, weight, linear, self._config, bits, weight_bits, search)

    def _behind_norms(self) -> list[Readers]:
        """The linears whose channels have steps, by the norm that they read."""
        static = self._options.activations != "dynamic"
        return [x for x in self._architecture.readers() if static and x.norm is not None]

    def channels(self) -> Channels:
        """What was measured at the blocks so far."""
        order = self._shares.argsort(descending=True, stable=True) if self._graded else None
        return Channels(order, self._scales, self._outliers if self.is_wanted else {})

    def _channel_scales(
        self, block: Block, linears: Sequence[Linear], energy: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Scales of the block's `linears`, by name."""
        for linear in linears:
            weight = block.weight(linear.name)
            columns = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float64)
            parts = (energy[linear.name], columns.square())
            shared = (shared_channels(x, self._config, linear) for x in parts)
            yield linear.name, channel_scales(*shared)


def _run(
    block: Block,
    scaled: Sequence[Linear],
    behind: Sequence[Readers],
    kept: Mapping[str, list[Tensor]],
    batches: Sequence[Tensor],
) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What the block emits, and what its linears read.

    Args:
        kept: gets what the linears that it names read, [windows, length, K] each.

    Returns:
        outputs; of the linears that are to be `scaled` the inputs' relative energy [K]; of the
        first linear `behind` each norm the largest magnitude of each channel [n]; both by name.
    """
    outputs: list[Tensor] = []
    energy: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}
    observed = [x.name for x in scaled] + [x.linears[0].name for x in behind] + list(kept)
    energetic = {x.name for x in scaled}
    for hidden in batches:
        output, inputs = block.forward_with_inputs(hidden, observed)
        outputs.append(output)
        for name, x in inputs.items():
            if name in kept:
                kept[name].append(x)
                continue
            if name in energetic:
                energy[name] = energy.get(name, 0.0) + relative_energy(x)
                continue
            sizes = x.flatten(0, -2).abs().amax(dim=0)
            largest[name] = torch.maximum(largest.get(name, sizes), sizes)
    return outputs, energy, largest


def variance_shares(batches: Sequence[Tensor]) -> Tensor:
    """Each channel's share of the variance over tokens: float64 [n].

    Args:
        batches: hidden states [..., n], of which each token is first divided by its root mean
            square, as a norm does.
    """
    x = torch.cat([batch.reshape(-1, batch.shape[-1]) for batch in batches])
    x = x / x.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-30)
    variance = x.var(dim=0, unbiased=False).to(torch.float64)
    return variance / variance.sum().clamp(min=1e-30)

"""A model with equalized channels: a reader that scales rows of one weight, columns of another.

A channel of down's input is act(gate) * up, one of o's input a mixture of a value's channel. To
divide up's or v's row by s and multiply down's or o's column by s leaves the function as it is
(cross-layer equalization, Nagel et al., 2019; SmoothQuant, Xiao et al., 2023).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mergequant.errors import InputError
from mergequant.model.architecture import MIDDLE, MIX, UP, VALUE, Architecture, Linear
from mergequant.model.fused_rows import rows_of
from mergequant.model.reader import ModelReader, computed
from mergequant.model.shapes import linear_shape, widths

# By the space that a linear reads, the one whose writer carries the channel's size.
CARRIED_BY: Mapping[str, str] = {MIDDLE: UP, MIX: VALUE}


class EqualizedReader(ModelReader):
    """A view of `reader`'s model in which the inputs of some linears are divided by `scales`.

    Args:
        reader: the plain model.
        scales: float32 [K] by full name of a linear, see `Channels`; the same for the query heads
            that share a value head.
        dtype: of what is scaled; float64 for proofs.
    """

    def __init__(
        self,
        reader: ModelReader,
        architecture: Architecture,
        scales: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._source = reader
        self._dtype = dtype
        self._columns: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        headers = dict(reader.headers)
        for number in range(int(reader.config["num_hidden_layers"])):
            prefix = f"{architecture.block.format(block=number)}."
            for linear, carrier in equalized(architecture):
                scale = scales.get(f"{prefix}{linear.name}")
                if scale is None:
                    continue
                self._columns[f"{prefix}{linear.name}.weight"] = scale
                own = own_channels(scale, reader.config, linear)
                rows = _all_rows(architecture, carrier, CARRIED_BY[linear.reads], own, reader)
                for part in ("weight", "bias"):
                    self._rows[f"{prefix}{carrier.name}.{part}"] = rows
        for name in {*self._columns, *self._rows} & headers.keys():
            headers[name] = computed(headers[name], dtype)
        super().__init__(reader.folder, reader.config, headers, reader.online)

    def read(self, name: str) -> Tensor:
        """One tensor, scaled in float64 and given as float32; or the source's if nothing scales."""
        return self._scaled(name, self._source.read(name), self._dtype)

    def read_in_source_dtype(self, name: str) -> Tensor:
        """Read one tensor, rounded to the dtype of the source."""
        tensor = self._source.read_in_source_dtype(name)
        return self._scaled(name, tensor, tensor.dtype)

    def residual(self, hidden: Tensor) -> Tensor:
        """Hidden states of the source model as its reader has them: nothing of them is scaled."""
        return self._source.residual(hidden)

    def _scaled(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if name not in self._columns and name not in self._rows:
            return tensor
        tensor = tensor.to(torch.float64)
        if name in self._columns:
            tensor = tensor * self._columns[name]
        if name in self._rows:
            rows = self._rows[name].to(torch.float64)
            tensor = tensor / (rows[:, None] if tensor.ndim == 2 else rows)
        return tensor.to(dtype)

    def check_finite(self) -> None:
        """Check the plain model."""
        self._source.check_finite()


def equalized(architecture: Architecture) -> Iterator[tuple[Linear, Linear]]:
    """Linears whose inputs can be scaled, each with the linear that carries its channels' size."""
    writers = {space: linear for linear in architecture.linears for space in linear.written}
    for linear in architecture.linears:
        carrier = writers.get(CARRIED_BY.get(linear.reads, ""))
        if carrier is not None:
            yield linear, carrier


def _all_rows(
    architecture: Architecture, carrier: Linear, space: str, scale: Tensor, reader: ModelReader
) -> Tensor:
    """What each row of `carrier` is divided by, where those that write `space` are by `scale`."""
    rows = rows_of(architecture, carrier, reader.config)
    mine = rows[space]
    if mine is None:
        return scale
    whole = torch.ones(linear_shape(architecture, carrier, reader.config)[0], dtype=scale.dtype)
    whole[mine] = scale
    return whole


def is_carried(architecture: Architecture, space: str) -> bool:
    """Whether a linear of the block carries the size of the channels of `space`."""
    return any(linear.reads == space for linear, _ in equalized(architecture))


def own_channels(scale: Tensor, config: Mapping[str, Any], linear: Linear) -> Tensor:
    """The carrier's scale for the linear's [K]: of a value head, that of its first query head."""
    if linear.reads != MIX:
        return scale
    by_group = _by_group(scale, config)
    first = by_group[:, :1]
    if not torch.equal(first.expand_as(by_group), by_group):
        raise InputError(f"Scales of {linear.name!r} differ between heads that share a value.")
    return first.reshape(-1)


def shared_channels(x: Tensor, config: Mapping[str, Any], linear: Linear) -> Tensor:
    """Mean of x [K] over the query heads that share a value head: [K]."""
    if linear.reads != MIX:
        return x
    by_group = _by_group(x, config)
    return by_group.mean(dim=1, keepdim=True).expand_as(by_group).reshape(-1)


def as_carried(x: Tensor, config: Mapping[str, Any], linear: Linear) -> Tensor:
    """What `linear` reads, or its weight, by the channels of what carries it: [..., K] to [t, k].

    Query heads that share a value head become further rows.
    """
    rows = x.reshape(-1, x.shape[-1])
    if linear.reads != MIX:
        return rows
    width = widths(config)
    heads = width["keys"] // width["head"]
    grouped = rows.reshape(len(rows), heads, -1, width["head"]).transpose(1, 2)
    return grouped.reshape(-1, width["keys"])


def as_read(x: Tensor, config: Mapping[str, Any], linear: Linear) -> Tensor:
    """Numbers of the carrier's channels [k] for each channel that `linear` reads: [K]."""
    if linear.reads != MIX:
        return x
    width = widths(config)
    shared = width["queries"] // width["keys"]
    by_head = x.reshape(-1, 1, width["head"])
    return by_head.expand(-1, shared, -1).reshape(-1)


def _by_group(x: Tensor, config: Mapping[str, Any]) -> Tensor:
    """[K] to [value heads, query heads of each, channels of a head]."""
    width = widths(config)
    return x.reshape(width["keys"] // width["head"], -1, width["head"])

"""Static steps of what o and down read, carried by rows of v and up (migration beyond the paper).

A channel of o's input is a mixture of one value channel, one of down's act(gate) * up: where v's or
up's row is divided by s, what o or down reads is in units of s. Every query head that shares a
value head shares its steps, so that its tokens count as further tokens of the value's channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergequant.methods.clip import ChannelRange
from mergequant.methods.migrate import activation_steps
from mergequant.model.architecture import MIDDLE, Linear
from mergequant.model.equalized_reader import as_carried, as_read
from mergequant.quantizer.inputs.record import ClipSearch

# Of down's input at 8 bits, where rounding costs less than clamping what calibration did not see.
# SmolLM2-135M, down's inputs alone in 8 bits: with the largest values seen it loses 0.047 nats,
# with these 0.018; o's inputs and weights by the search 0.0003 (benchmarks.method.carried).
_WIDE, _MARGIN, _FLOOR = 8, 1.25, 0.9
_LARGEST_RATIO = 1024.0  # of the median over a step: 16-bit formats hold what is divided by it


def with_headroom(largest: Tensor) -> Tensor:
    """What channels are to reach whose `largest` magnitudes [n] calibration saw.

    A quarter more; and no less than nine tenths of the channels were seen to reach, since one that
    was small on this text may be as large as others on the next.
    """
    return torch.maximum(largest * _MARGIN, largest.quantile(_FLOOR))


def carried_steps(
    inputs: Sequence[Tensor],
    weight: Tensor,
    linear: Linear,
    config: Mapping[str, Any],
    bits: int,
    weight_bits: int,
    search: ClipSearch | None,
) -> Tensor:
    """The step of each channel that `linear` reads: float64 [K], alike where a value is shared.

    Args:
        inputs: [..., K] each, what it reads in the plain model.
        weight: [out, K], its own.
        search: None: nothing is clipped.
    """
    tokens = [as_carried(x, config, linear) for x in inputs]
    rows = as_carried(weight, config, linear)
    largest = torch.stack([x.abs().amax(dim=0) for x in tokens]).amax(dim=0)
    spans = ChannelRange.symmetric(largest, bits)
    clip = torch.ones_like(largest, dtype=torch.float64)
    if linear.reads == MIDDLE and bits == _WIDE:
        largest = with_headroom(largest)
    elif search is not None:
        clip = search.of_channels(tokens, rows, spans, bits, weight_bits)
    steps = activation_steps(largest, clip, spans.levels)
    return as_read(steps.clamp(min=steps.median() / _LARGEST_RATIO), config, linear)

"""The walk that pilots share: the full-precision model once, on the first of the calibration text.

At every block channels are measured, where `Options` ask for it; at a few, what the block reads is
kept, for the pilots that try candidates there.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from mergequant.model.channels import Channels
from mergequant.model.decoder import Decoder
from mergequant.options import Options
from mergequant.quantizer.decision import possible_rotations
from mergequant.quantizer.measure_channels import ChannelMeter
from mergequant.quantizer.prepare import open_model

Kind = TypeVar("Kind")

_BLOCKS = 3  # at most so many are tried, evenly spaced
_TOKENS = 4096  # about so many tell candidates apart, and a channel's variance to a few percent
_HOPELESS = 2.0  # times the least error


@dataclass(frozen=True)
class PilotWalk:
    """What the walk found.

    Attributes:
        channels: what was measured of them.
        inputs: by number, what the blocks that are to be tried read: hidden states of the plain
            model, float32 [windows, length, n] each. Empty if no pilot tries anything.
        loss: of the model, nats a token; None: the walk did not go to its end.
    """

    channels: Channels = field(default_factory=Channels)
    inputs: Mapping[int, list[Tensor]] = field(default_factory=dict)
    loss: float | None = None


def walk_plain_model(
    model: str | Path, windows: Tensor, options: Options, device: torch.device, progress: bool
) -> PilotWalk:
    """Walk through the plain model as far as anything is to be measured.

    Args:
        model: folder or hub id.
        windows: token ids int64 [samples, length]; the first are used.
    """
    reader, architecture, _ = open_model(model, options.model_copy(update={"rotation": "none"}))
    meter = ChannelMeter(architecture, reader.config, options)
    rotations = possible_rotations(architecture, reader.config, options)
    reconstructed = options.reconstruction != "none" and options.activations != "dynamic"
    count = int(reader.config["num_hidden_layers"])
    tried = _spread(count) if len(rotations) > 1 or reconstructed else []
    last = count if meter.is_wanted else max(tried, default=-1) + 1
    if last == 0:
        return PilotWalk()
    used = pilot_windows(windows, options)
    if options.activations == "fully_static":
        # Steps that nothing later corrects: from as much text as those of the norms.
        walked = windows[: max(len(used), min(options.statistics_samples, len(windows)))]
    else:
        walked = used
    decoder = Decoder(reader, architecture, device)
    embedded = decoder.embed(walked, len(used), len(used))
    batches, tried_on = embedded.batches, embedded.statistics
    inputs: dict[int, list[Tensor]] = {}
    for number in tqdm(range(last), desc="Pilot, plain model", unit="block", disable=not progress):
        if number in tried:
            inputs[number] = batches[:tried_on]
        with decoder.block(number) as block:
            batches = meter.advance(block, batches)
    loss = decoder.loss(batches[:tried_on], used) if last == count else None
    return PilotWalk(meter.channels(), inputs, loss)


def pilot_windows(windows: Tensor, options: Options) -> Tensor:
    """The first of the calibration windows [samples, length], which pilots use."""
    return windows[: min(options.statistics_samples, max(1, _TOKENS // windows.shape[1]))]


def contenders(candidates: Iterable[Kind], error: Callable[[Kind], float]) -> list[Kind]:
    """Those that are tried further and may be chosen: their error is at most twice the least.

    Args:
        error: of a candidate at the blocks so far, which must be the same for all of them.
    """
    errors = [(candidate, error(candidate)) for candidate in candidates]
    limit = _HOPELESS * min(value for _, value in errors)
    return [candidate for candidate, value in errors if value <= limit]


def _spread(count: int) -> list[int]:
    """At most `_BLOCKS` numbers below `count`, evenly spaced."""
    return sorted({count * (2 * number + 1) // (2 * _BLOCKS) for number in range(_BLOCKS)})

"""Which reconstruction to use, measured on calibration text before anything is quantized.

One pass of the full-precision model. At each norm, each candidate's steps, columns and rounded
weights are tried, and the error at the linears' outputs is taken relative to those outputs, the
mean over all norms. A longer K costs time and memory in proportion, so what is minimised is the
error times K / n: a candidate that makes K grow by 12.5% must lower the error by more than that.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergequant.calibration.statistics import Hessian
from mergequant.errors import InputError
from mergequant.methods.gptq import (
    NotPositiveDefiniteError,
    gptq,
    invert_hessian,
    round_to_nearest,
)
from mergequant.methods.weights import weight_grid
from mergequant.model.architecture import Norm, Stage, paper_alpha, widths
from mergequant.model.decoder import Block, Decoder
from mergequant.options import Options
from mergequant.output.checkpoint_plan import padded_columns, reconstructed_columns, tile_of
from mergequant.quantizer.inputs.record import stacked_weights
from mergequant.quantizer.inputs.static import (
    ChannelCalibration,
    calibrate_channels,
    columns_of,
    reading,
)
from mergequant.quantizer.linears import weight_form

DECIDED = ("reconstruction", "alpha", "max_extra_channels")  # fields of `Options`

logger = logging.getLogger("mergequant")

# Tried beside the paper's: to prune much hurts, and padding is paid for by the tile.
_ALPHAS: dict[str, tuple[float, ...]] = {"none": (), "prune": (1.0,), "pad": (0.0,)}
_BLOCKS = 4  # at most so many are tried, evenly spaced


@dataclass
class Candidate:
    """One reconstruction that is tried.

    Attributes:
        options: as they would be used.
        columns: K that it needs, and no longer than it may be.
        errors: relative squared error at the outputs behind each norm.
    """

    options: Options
    columns: int
    errors: list[float] = field(default_factory=list)

    @property
    def error(self) -> float:
        """Mean over the norms."""
        return sum(self.errors) / len(self.errors)


def resolve_reconstruction(
    decoder: Decoder, windows: Tensor, options: Options, progress: bool
) -> Options:
    """`options` with a mode, a threshold and a K that are decided.

    Args:
        windows: token ids int64 [samples, length]; the first `statistics_samples` are used.
    """
    if options.reconstruction == "none" or options.activations == "dynamic":
        return options.model_copy(update={"reconstruction": "none", "alpha": 0.0})
    candidates = list(_candidates(decoder, options))
    channels = widths(dict(decoder.reader.config))["hidden"]
    if len(candidates) > 1 or candidates[0].options.reconstruction == "pad":
        _measure(decoder, windows, candidates, progress)
        for found in candidates:
            growth = _growth(found, channels)
            logger.info("%s: error %.4g, K%+.1f%%", _name(found), found.error, growth)
    if len(candidates) == 1:
        return _decided(candidates[0], channels)
    return _decided(
        min(candidates, key=lambda x: x.error * (1 + _growth(x, channels) / 100)), channels
    )


def _candidates(decoder: Decoder, options: Options) -> Iterator[Candidate]:
    config = dict(decoder.reader.config)
    channels, paper = widths(config)["hidden"], paper_alpha(config)
    modes: tuple[str, ...] = ("none", "prune", "pad")
    if options.reconstruction != "auto":
        modes = (options.reconstruction,)
    for mode in modes:
        no_room = padded_columns(options, channels) <= channels
        if mode == "pad" and options.reconstruction == "auto" and no_room:
            continue
        alphas: tuple[float, ...] = (paper,)
        if options.alpha == "auto":
            alphas += _ALPHAS[mode]
        elif not isinstance(options.alpha, str):
            alphas = (options.alpha,)
        for alpha in alphas[:1] if mode == "none" else alphas:
            changed = options.model_copy(update={"reconstruction": mode, "alpha": alpha})
            yield Candidate(changed, channels)


def _measure(
    decoder: Decoder,
    windows: Tensor,
    candidates: list[Candidate],
    progress: bool,
) -> None:
    """Run the full-precision model and try every candidate at every norm."""
    used = windows[: candidates[0].options.statistics_samples]
    batches = decoder.embed(used, len(used), 0).batches
    blocks = int(decoder.reader.config["num_hidden_layers"])
    tried = {round(x) for x in torch.linspace(0, blocks - 1, min(blocks, _BLOCKS)).tolist()}
    for block in decoder.walk(batches, max(tried) + 1, "Pilot", progress):
        for stage in decoder.architecture.stages():
            if stage.norm is not None and block.number in tried:
                _try_all(block, stage, stage.norm, batches, candidates)


def _try_all(
    block: Block, stage: Stage, norm: Norm, batches: list[Tensor], candidates: list[Candidate]
) -> None:
    found = calibrate_channels(block, stage, norm, batches, candidates[0].options)
    weights = stacked_weights(block, stage)
    seen: list[Tensor] = []
    block.observe(stage.linears[0].name, batches, seen.append)
    for candidate in candidates:
        candidate.errors.append(_error(seen, weights, found, candidate))


def _error(
    inputs: list[Tensor], weights: Tensor, found: ChannelCalibration, candidate: Candidate
) -> float:
    """Relative squared error of one candidate's output at one norm; notes the K it needs."""
    options, step, shape = candidate.options, found.folded.step, None
    if options.reconstruction != "none":
        columns = reconstructed_columns(options, len(step))
        try:
            shape = columns_of(found, weights, options, columns)
        except InputError:  # too many copies to prune for
            return math.inf
        candidate.columns = max(candidate.columns, columns - shape.padding)
    source = reading(step, shape, options.static_bits, {}, {})
    divided = [source.dequantized(x / step.to(torch.float32)) for x in inputs]
    weight = _rounded(source.folded_weight(weights.to(torch.float64)), divided, options)
    error = energy = 0.0
    for x, codes in zip(inputs, divided, strict=True):
        exact = x @ weights.T
        error += float((codes @ weight.T - exact).square().sum(dtype=torch.float64))
        energy += float(exact.square().sum(dtype=torch.float64))
    return error / energy if energy > 0 else 0.0


def _rounded(weight: Tensor, inputs: list[Tensor], options: Options) -> Tensor:
    """A folded weight [out, K] as GPTQ would round it: float32."""
    grid = weight_grid(weight, weight_form(options))
    seen = Hessian()
    for x in inputs:
        seen.add(x)
    try:
        inverse = invert_hessian(seen.get(), options.damping)
        codes = gptq(weight, grid, inverse, options.gptq_block)
    except NotPositiveDefiniteError:
        codes = round_to_nearest(weight, grid)
    return grid.dequantize(codes).to(torch.float32)


def _decided(found: Candidate, channels: int) -> Options:
    """Its options, with K no longer than it needs."""
    options = found.options
    if options.reconstruction != "pad":
        return options
    if found.columns == channels:  # no copies, nothing to pad
        return options.model_copy(update={"reconstruction": "none"})
    growth = _tiled(found.columns, channels) / channels - 1
    return options.model_copy(update={"max_extra_channels": growth})


def _tiled(columns: int, channels: int) -> int:
    tile = tile_of(channels)
    return -(-columns // tile) * tile


def _growth(found: Candidate, channels: int) -> float:
    return 100 * (_tiled(found.columns, channels) / channels - 1)


def _name(found: Candidate) -> str:
    options = found.options
    mode = options.reconstruction
    return f"Reconstruction {mode}" + ("" if mode == "none" else f", alpha {options.alpha:g}")

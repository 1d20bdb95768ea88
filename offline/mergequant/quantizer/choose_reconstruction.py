"""Which reconstruction to use, measured on calibration text before anything is quantized.

At each norm of a few blocks of the full-precision model, each candidate's steps, columns and
rounded weights are tried, and the error at the linears' outputs is taken relative to those outputs,
the mean over the norms. A longer K costs time and memory in proportion, so what is minimised is the
error times K / n: a candidate that makes K grow by 12.5% must lower the error by more than that.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from mergequant.calibration.statistics import Moments
from mergequant.errors import InputError
from mergequant.methods.gptq import (
    NotPositiveDefiniteError,
    gptq,
    invert_hessian,
    round_to_nearest,
)
from mergequant.methods.reconstruct import Reconstruction
from mergequant.methods.weights import weight_grid
from mergequant.model.architecture import Norm
from mergequant.model.block import Block
from mergequant.model.decoder import Decoder
from mergequant.model.shapes import paper_alpha, widths
from mergequant.options import Options
from mergequant.quantizer.columns import columns_plan, padded_columns, tile_of
from mergequant.quantizer.decision import Decision
from mergequant.quantizer.forms import static_form
from mergequant.quantizer.inputs.record import stacked_weights
from mergequant.quantizer.inputs.static import (
    ChannelCalibration,
    calibrate_channels,
    columns_of,
    static_input,
)
from mergequant.quantizer.pilot_walk import contenders
from mergequant.quantizer.plan import WeightPlan
from mergequant.quantizer.resolve import static_input_plan, weight_plan

logger = logging.getLogger("mergequant")

# Tried beside the paper's: to prune much hurts, and padding is paid for by the tile.
_ALPHAS: dict[str, tuple[float, ...]] = {"none": (), "prune": (1.0,), "pad": (0.0,)}
# An error that no columns are spent on: W4A4's is twenty times as large, and costs 0.3 nats.
_NEGLIGIBLE = 1e-3
_TOKENS_AT_ONCE = 512


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


@dataclass
class _Site:
    """A norm at which candidates are tried.

    Attributes:
        inputs: [tokens, n] each, what its readers read.
        weights: [out, n], of all of them.
        calibration: of its channels.
        norm_adds: the norm has a bias.
        unchanged: the error of the channels as they are, which several candidates leave so.
    """

    inputs: list[Tensor]
    weights: Tensor
    calibration: ChannelCalibration
    norm_adds: bool
    unchanged: float | None = None


def resolve_reconstruction(
    decoder: Decoder, inputs: Mapping[int, list[Tensor]], options: Options, progress: bool
) -> Decision:
    """Decide on a mode, a threshold and a K.

    Args:
        inputs: by number of block, what the plain model's reads, see `PilotWalk`.
        options: with the rotation decided.
    """
    architecture = decoder.architecture
    impossible = options.reconstruction == "auto" and architecture.bare_inputs
    if all(readers.norm is None for readers in architecture.readers()):
        impossible = True  # OLMo 2: there is no norm to reconstruct behind
    if impossible or options.reconstruction == "none" or options.activations == "dynamic":
        return Decision(
            rotation=options.decided_rotation,
            reconstruction="none",
            alpha=0.0,
            max_extra_channels=options.max_extra_channels,
        )
    candidates = list(_candidates(decoder, options))
    channels = widths(dict(decoder.reader.config))["hidden"]
    if len(candidates) > 1 or candidates[0].options.reconstruction == "pad":
        left = _measure(decoder, inputs, candidates, progress)
        for candidate in candidates:
            growth, given_up = _growth(candidate, channels), candidate not in left
            told = "%s: error %.4g, K%+.1f%%" + ", given up" * given_up
            logger.info(told, _name(candidate), candidate.error, growth)
        candidates = left
    if len(candidates) == 1:
        return _decided(candidates[0], channels)
    return _decided(min(candidates, key=lambda x: _price(x, channels)), channels)


def _price(candidate: Candidate, channels: int) -> float:
    """Error times K: a hundredth more columns must take a hundredth of the error away."""
    return _counted_error(candidate) * (1 + _growth(candidate, channels) / 100)


def _counted_error(candidate: Candidate) -> float:
    return max(candidate.error, _NEGLIGIBLE)


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
    inputs: Mapping[int, list[Tensor]],
    candidates: list[Candidate],
    progress: bool,
) -> list[Candidate]:
    """Try every candidate at every norm of the blocks; returns those that were to the end."""
    left = candidates
    for number in tqdm(inputs, desc="Pilot, reconstruction", unit="block", disable=not progress):
        batches = [decoder.reader.residual(hidden) for hidden in inputs[number]]
        with decoder.block(number) as block:
            for readers in decoder.architecture.readers():
                if readers.norm is not None:
                    names = [linear.name for linear in readers.linears]
                    _try_all(block, names, readers.norm, batches, left)
        left = contenders(left, _counted_error)
    return left


def _try_all(
    block: Block,
    linears: list[str],
    norm: Norm,
    batches: list[Tensor],
    candidates: list[Candidate],
) -> None:
    weights = stacked_weights(block, linears)
    inputs: list[Tensor] = []
    block.observe(linears[0], batches, inputs.append)
    plan = static_input_plan(candidates[0].options, norm, None)
    calibration = calibrate_channels(plan, block, linears[0], inputs, weights)
    site = _Site(inputs, weights, calibration, calibration.folded.bias is not None)
    for candidate in candidates:
        candidate.errors.append(_error(site, candidate))


def _error(site: _Site, candidate: Candidate) -> float:
    """Relative squared error of one candidate's output at one norm; notes the K it needs."""
    calibration = site.calibration
    plan, columns = columns_plan(candidate.options, len(calibration.folded.step)), None
    if plan is not None:
        try:
            columns = columns_of(calibration, site.weights, plan)
        except InputError:  # too many copies to prune for
            return math.inf
        candidate.columns = max(candidate.columns, plan.count - columns.padding)
    if columns is not None and (columns.copies > 0 or len(columns.dropped) > 0):
        return _output_error(site, columns, candidate.options)
    if site.unchanged is None:
        site.unchanged = _output_error(site, columns, candidate.options)
    return site.unchanged


def _output_error(site: _Site, columns: Reconstruction | None, options: Options) -> float:
    calibration, weights = site.calibration, site.weights
    source = static_input(calibration, columns, options.static_bits, {}, {})
    divided = [source.dequantized(calibration.emitted(x)) for x in site.inputs]
    wide = weights.to(torch.float64)
    form = static_form(options, len(calibration.clip), site.norm_adds).weight
    weight = _rounded(source.folded_weight(wide), divided, weight_plan(options, form))
    offset = source.output_offset(wide)
    error = energy = 0.0
    for x, codes in zip(_in_parts(site.inputs), _in_parts(divided), strict=True):
        exact = x @ weights.T
        output = codes @ weight.T
        output = output if offset is None else output + offset
        error += float((output - exact).square().sum(dtype=torch.float64))
        energy += float(exact.square().sum(dtype=torch.float64))
    return error / energy if energy > 0 else 0.0


def _in_parts(inputs: list[Tensor]) -> Iterator[Tensor]:
    """Fewer tokens at once: the outputs of a whole batch would be the largest thing in memory."""
    for x in inputs:
        yield from torch.split(x, _TOKENS_AT_ONCE)


def _rounded(weight: Tensor, inputs: list[Tensor], plan: WeightPlan) -> Tensor:
    """A folded weight [out, K] as GPTQ would round it: float32."""
    grid = weight_grid(weight, plan.form, plan.search)
    moments = Moments()
    for x in inputs:
        moments.add(x)
    try:
        inverse = invert_hessian(moments.hessian(), plan.damping)
        codes = gptq(weight, grid, inverse, plan.gptq_block)
    except NotPositiveDefiniteError:
        codes = round_to_nearest(weight, grid)
    return grid.dequantize(codes).to(torch.float32)


def _decided(candidate: Candidate, channels: int) -> Decision:
    """The candidate, with K no longer than it needs."""
    options = candidate.options
    mode, growth = options.reconstruction, options.max_extra_channels
    if mode == "pad":
        if candidate.columns == channels:  # no copies, nothing to pad
            mode = "none"
        else:
            growth = _tiled(candidate.columns, channels) / channels - 1
    assert mode != "auto" and not isinstance(options.alpha, str)
    return Decision(
        rotation=options.decided_rotation,
        reconstruction=mode,
        alpha=options.alpha,
        max_extra_channels=growth,
    )


def _tiled(columns: int, channels: int) -> int:
    tile = tile_of(channels)
    return -(-columns // tile) * tile


def _growth(candidate: Candidate, channels: int) -> float:
    return 100 * (_tiled(candidate.columns, channels) / channels - 1)


def _name(candidate: Candidate) -> str:
    options = candidate.options
    mode = options.reconstruction
    return f"Reconstruction {mode}" + ("" if mode == "none" else f", alpha {options.alpha:g}")

"""Whether to rotate, measured on calibration text before anything is quantized.

Some blocks are quantized by the very plan of each candidate, on what the full-precision model hands
them, and what is compared is the error of a block's output, relative to what the block adds.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mergequant.model.architecture import Architecture
from mergequant.model.block import Block
from mergequant.model.channels import Channels
from mergequant.model.decoder import Activations, Decoder
from mergequant.options import Options, Rotation
from mergequant.quantizer.block import quantize_block
from mergequant.quantizer.decision import possible_rotations
from mergequant.quantizer.pilot_walk import PilotWalk, contenders
from mergequant.quantizer.plan import BlockPlan, Plan
from mergequant.quantizer.prepare import open_model
from mergequant.quantizer.resolve import make_plan

logger = logging.getLogger("mergequant")


def resolve_rotation(
    model: str | Path, walked: PilotWalk, options: Options, device: torch.device, progress: bool
) -> Rotation:
    """The rotation of least error among those that the model allows.

    Args:
        model: folder or hub id.
        walked: what the plain model's blocks read, and what calibration says of channels.
    """
    reader, architecture, _ = open_model(model, options.model_copy(update={"rotation": "none"}))
    candidates = possible_rotations(architecture, reader.config, options)
    if len(candidates) == 1:
        return candidates[0]
    candidates_options = {
        rotation: options.plain().model_copy(update={"rotation": rotation})
        for rotation in candidates
    }
    errors = _errors(model, walked, candidates_options, device, progress)
    for rotation, error in errors.items():
        logger.info("Rotation %s: error %.4g", rotation, error)
    return min(errors, key=errors.__getitem__)


@dataclass(frozen=True)
class _Candidate:
    """A rotation that is tried: the model as it would be quantized, and the plan of that."""

    decoder: Decoder
    plan: Plan

    @classmethod
    def of(
        cls,
        model: str | Path,
        options: Options,
        channels: Channels,
        device: torch.device,
    ) -> "_Candidate":
        reader, architecture, _ = open_model(model, options, channels)
        plan = make_plan(architecture, reader.config, options, "")
        return cls(Decoder(reader, architecture, device), plan)

    def error(self, number: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
        """Relative squared error of the output of block `number`, see `_block_error`.

        Args:
            inputs: what the source model's block reads, [windows, length, n] each.
            outputs: what it emits.
        """
        turned = [[self.decoder.reader.residual(x) for x in batch] for batch in (inputs, outputs)]
        with self.decoder.block(number) as block:
            architecture = self.decoder.architecture
            return _block_error(block, architecture, self.plan.blocks[number], *turned)


def _errors(
    model: str | Path,
    walked: PilotWalk,
    options: Mapping[Rotation, Options],
    device: torch.device,
    progress: bool,
) -> dict[Rotation, float]:
    """Mean error of the blocks that are tried, for each rotation that was tried to the end."""
    candidates = {
        key: _Candidate.of(model, of, walked.channels, device) for key, of in options.items()
    }
    plain = open_model(model, next(iter(options.values())).model_copy(update={"rotation": "none"}))
    decoder = Decoder(plain[0], plain[1], device)
    blocks = next(iter(candidates.values())).plan.blocks
    tried = [number for number in walked.inputs if blocks[number].readers]
    sums = dict.fromkeys(candidates, 0.0)
    for number in tqdm(tried, desc="Pilot, rotation", unit="block", disable=not progress):
        inputs = walked.inputs[number]
        with decoder.block(number) as block:
            outputs = [block.forward(hidden) for hidden in inputs]
        for rotation in sums:
            sums[rotation] += candidates[rotation].error(number, inputs, outputs)
        left = contenders(sums, sums.__getitem__)
        for rotation in sums.keys() - left:
            logger.info("Rotation %s: errs twice as much as another", rotation)
            del sums[rotation]
    return {rotation: total / max(len(tried), 1) for rotation, total in sums.items()}


def _block_error(
    block: Block,
    architecture: Architecture,
    plan: BlockPlan,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> float:
    """Squared error of a block's output once it is quantized, over the square of what it adds."""
    count = len(inputs)
    activations = Activations(list(inputs), statistics=count, gptq=count, exact=[])
    with tqdm(disable=True) as bar:
        quantize_block(block, architecture, activations, [], plan, bar)
    activations.advance(block.forward, [])
    pairs = zip(activations.batches, outputs, strict=True)
    error = sum(float((y - exact).square().sum(dtype=torch.float64)) for y, exact in pairs)
    added = sum(
        float((exact - x).square().sum(dtype=torch.float64))
        for x, exact in zip(inputs, outputs, strict=True)
    )
    return error / added if added > 0 else 0.0

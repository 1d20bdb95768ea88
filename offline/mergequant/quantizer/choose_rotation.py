"""Whether to rotate, measured on calibration text before anything is quantized.

Some blocks are quantized by the very plan of each candidate, on what the full-precision model hands
them, and what is compared is the error of a block's output, relative to what the block adds.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mergequant.model.architecture import Architecture
from mergequant.model.decoder import Activations, Block, Decoder
from mergequant.options import Options, Rotation
from mergequant.quantizer.block import quantize_block
from mergequant.quantizer.decision import possible_rotations
from mergequant.quantizer.plan import BlockPlan
from mergequant.quantizer.prepare import open_model
from mergequant.quantizer.resolve import make_plan

logger = logging.getLogger("mergequant")

_BLOCKS = 3  # at most so many are tried, evenly spaced
_TOKENS = 8192  # about so many are enough to tell rotations apart


def resolve_rotation(
    model: str | Path, windows: Tensor, options: Options, device: torch.device, progress: bool
) -> Rotation:
    """The rotation of least error among those that the model allows.

    Args:
        model: folder or hub id.
        windows: token ids int64 [samples, length]; the first are used.
    """
    reader, architecture, _ = open_model(model, options.model_copy(update={"rotation": "none"}))
    candidates = possible_rotations(architecture, reader.config, options)
    if len(candidates) == 1:
        return candidates[0]
    used = windows[: max(1, _TOKENS // windows.shape[1])]
    errors = {}
    for rotation in candidates:
        errors[rotation] = _error(model, used, _plain(options, rotation), device, progress)
        logger.info("Rotation %s: error %.4g", rotation, errors[rotation])
    return min(errors, key=errors.__getitem__)


def _plain(options: Options, rotation: Rotation) -> Options:
    """What tells rotations apart: `options` without reconstruction and training."""
    plain = {"reconstruction": "none", "alpha": 0.0, "compensation_rank": 0}
    return options.model_copy(update={**plain, "rotation": rotation})


def _error(
    model: str | Path, windows: Tensor, options: Options, device: torch.device, progress: bool
) -> float:
    """Mean relative squared error of the outputs of the blocks that are tried."""
    reader, architecture, _ = open_model(model, options)
    decoder = Decoder(reader, architecture, device)
    plan = make_plan(architecture, reader.config, options, "")
    count = len(plan.blocks)
    tried = sorted({count * (2 * number + 1) // (2 * _BLOCKS) for number in range(_BLOCKS)})
    batches = decoder.embed(windows, len(windows), len(windows)).batches
    errors = []
    walk = tqdm(range(tried[-1] + 1), desc=f"Pilot, rotation {options.rotation}", unit="block")
    walk.disable = not progress
    for number in walk:
        with decoder.block(number) as block:
            outputs = [block.forward(hidden) for hidden in batches]
            if number in tried and plan.blocks[number].readers:
                errors.append(
                    _block_error(block, architecture, plan.blocks[number], batches, outputs)
                )
        batches = outputs
    return sum(errors) / len(errors) if errors else 0.0


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

"""The input of o, down, and of all linears of the dynamic baseline: one clip ratio (paper 4.2)."""

import torch
from torch import Tensor

from mergequant.calibration.statistics import ChannelMagnitudes
from mergequant.methods.clip import clip_grid, token_clip_losses
from mergequant.model.architecture import Stage
from mergequant.model.decoder import Block
from mergequant.options import Options
from mergequant.quantizer.inputs.record import StageInput, stacked_weights
from mergequant_vllm.format import LinearFormat
from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.hadamard.reference import rotate
from mergequant_vllm.kernels.token_quant.reference import token_codes
from mergequant_vllm.rounding import SMALLEST_STEP, largest_code, round_to_codes, smallest_code


def dynamic_input(
    block: Block, stage: Stage, batches: list[Tensor], options: Options, form: LinearFormat
) -> StageInput:
    """Search one clip ratio for the stage's per-token steps.

    Args:
        batches: hidden states to calibrate on.
        form: how the stage's linears are stored.
    """
    if options.mix_activations == "tensor":
        return _tensor_input(block, stage, batches, form)
    bits, block_size = form.activation_bits, form.hadamard
    clip = _clip(block, stage, batches, options, form)

    def dequantized(x: Tensor) -> Tensor:
        codes, step, _ = token_codes(x, clip, bits, CodeLayout.FLOAT32, hadamard=block_size)
        return codes * step

    def relaxed(x: Tensor) -> Tensor:
        z = _rotated(x, block_size)
        largest = z.detach().abs().amax(dim=-1, keepdim=True)
        step = (largest * clip / largest_code(bits)).clamp(min=SMALLEST_STEP)
        return z.clamp(smallest_code(bits) * step, largest_code(bits) * step)

    return StageInput(dequantized, relaxed, {"clip": round(float(clip), 4)}, clip=clip)


def _clip(
    block: Block, stage: Stage, batches: list[Tensor], options: Options, form: LinearFormat
) -> Tensor:
    """The ratio of least error at the linears' output: float32 [1]."""
    device = batches[0].device
    clip = torch.ones(1, dtype=torch.float32, device=device)
    if options.clipping != "adaptive":
        return clip
    first = stage.linears[0].name
    grid = clip_grid(options.lowest_clip, options.clip_points)
    # The weights of such a linear were rotated as they were read; its float input is not.
    weights = stacked_weights(block, stage)
    losses = torch.zeros(len(grid), dtype=torch.float64, device=device)

    def add(x: Tensor) -> None:
        z = _rotated(x, form.hadamard)
        losses.add_(token_clip_losses(z, weights, grid, form.activation_bits))

    block.observe(first, batches, add)
    return grid[losses.argmin().cpu()].reshape(1).to(device, torch.float32)


def _tensor_input(
    block: Block, stage: Stage, batches: list[Tensor], form: LinearFormat
) -> StageInput:
    """One static step for the whole tensor: the baselines of the paper's Tables 1 and 4."""
    first, bits = stage.linears[0].name, form.activation_bits
    seen = ChannelMagnitudes()
    block.observe(first, batches, lambda x: seen.add(_rotated(x, form.hadamard)))
    step = (seen.largest.amax() / largest_code(bits)).clamp(min=SMALLEST_STEP)

    def relaxed(x: Tensor) -> Tensor:
        z = _rotated(x, form.hadamard)
        return z.clamp(smallest_code(bits) * step, largest_code(bits) * step)

    def dequantized(x: Tensor) -> Tensor:
        return round_to_codes(_rotated(x, form.hadamard) / step, bits) * step

    return StageInput(dequantized, relaxed, {"clip": 1.0})


def _rotated(x: Tensor, block: int | None) -> Tensor:
    return x if block is None else rotate(x, block)

"""Quantization step migration (paper 4.1, Eq. 4-5).

X_int = round(norm(x)) with the norm's multiplier divided by the activation step s, and
Y = alpha_w * (X_int @ W_int^T) with W_int the codes of W * s. Exact but for rounding: the stored
multiplier m is rounded to a value that bfloat16, float16 and float32 all hold, and s := norm / m is
what the weights absorb, so the pair agrees in whatever dtype the server runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergequant_vllm.rounding import (
    SMALLEST_STEP,
    largest_code,
    round_to_16_bit_normal,
)


@dataclass(frozen=True)
class FoldedNorm:
    """A norm that emits activations in units of their steps.

    Attributes:
        weight: float64 [n], to be stored in place of the norm's weight.
        bias: float64 [n] or None, in place of a LayerNorm's adder.
        step: float64 [n], s: what every reader's weight is multiplied by.
    """

    weight: Tensor
    bias: Tensor | None
    step: Tensor


def activation_steps(extent: Tensor, clip: Tensor, levels: int) -> Tensor:
    """s_k = c_k * extent_k / levels (Eq. 1, per channel).

    Args:
        extent: [n], max |X| of each channel over the calibration tokens, or with zero points
            max X - min X.
        clip: [n], ratios c_k.
        levels: steps that make it up: Q_b, or 2^b - 1.

    Returns:
        float64 [n]. A channel that never fired has the median step of those that did: nothing is
        known of it, and a tiny step would make any later value saturate.
    """
    step = extent.to(torch.float64) * clip.to(torch.float64) / levels
    fired = step > SMALLEST_STEP
    usual = step[fired].median() if bool(fired.any()) else step.new_tensor(1.0)
    return torch.where(fired, step, usual)


def tensor_steps(largest: Tensor, bits: int) -> Tensor:
    """One static step for all channels, the baseline of Table 4: [n] to float64 [n], equal."""
    return smooth_steps(largest, torch.ones_like(largest), bits, strength=0.0)


def smooth_steps(largest: Tensor, column: Tensor, bits: int, strength: float = 0.5) -> Tensor:
    """One static step for all channels after SmoothQuant evened them out (Xiao et al., Eq. 4).

    Channel k is divided by d_k = max|X_k|^a / max|W_k|^(1-a) and its column multiplied by it; the
    step is max_k(max|X_k| / d_k) / Q_b. Both fold into the norm as a step of d_k times that.

    Args:
        largest: [n], max |X| of each channel.
        column: [n], max |W| of each input channel, over the space's readers.
        strength: a; 0 evens out nothing where `column` is 1.

    Returns:
        float64 [n], positive.
    """
    largest, column = largest.to(torch.float64), column.to(torch.float64)
    alive = (largest > SMALLEST_STEP) & (column > 0)
    divisor = torch.where(alive, largest**strength / column ** (1 - strength), 1.0)
    step = (largest / divisor).amax() / largest_code(bits)
    return divisor * torch.where(step > SMALLEST_STEP, step, 1.0)


def fold_norm(
    weight: Tensor,
    bias: Tensor | None,
    step: Tensor,
    *,
    one_plus: bool = False,
    stored: Callable[[Tensor], Tensor] = round_to_16_bit_normal,
) -> FoldedNorm:
    """Divide a norm's output by `step`, by its parameters alone.

    Args:
        weight: [n], multiplier of an RMSNorm or LayerNorm (w of 1 + w if `one_plus`).
        bias: [n], a LayerNorm's adder, or None.
        step: [n], wanted activation steps, positive.
        one_plus: the norm multiplies by 1 + weight (Gemma).
        stored: rounds the multiplier to what the checkpoint can hold; identity for proofs.

    Returns:
        FoldedNorm whose `step` is the one that the rounded multiplier really divides by. A channel
        with multiplier 0 (dead: its output is constant) keeps multiplier 0 and the wanted step:
        any will do for its output, but readers share a weight step with its column.
    """
    offset = 1.0 if one_plus else 0.0
    gain = weight.to(torch.float64) + offset
    folded = stored(gain / step - offset)
    multiplier = folded + offset
    alive = (gain != 0) & (multiplier != 0)
    exact = torch.where(alive, gain / torch.where(alive, multiplier, 1.0), step.to(torch.float64))
    adder = None if bias is None else bias.to(torch.float64) / exact
    return FoldedNorm(weight=torch.where(alive, folded, -offset), bias=adder, step=exact)


def centred(
    folded: FoldedNorm,
    shift: Tensor,
    stored: Callable[[Tensor], Tensor] = round_to_16_bit_normal,
) -> tuple[FoldedNorm, Tensor]:
    """Let the bias of a LayerNorm take away the middle z of each channel (OutlierTune, step 1).

    Exact: (X - z) W^T + W z = X W^T. The rounding is the server's stored bias's, so z is what that
    really takes away.

    Args:
        folded: with a bias.
        shift: float64 [n], z.
        stored: as in `fold_norm`.

    Returns:
        the norm with bias (beta - z) / s as stored, and z: float64 [n].
    """
    assert folded.bias is not None
    bias = stored(folded.bias - shift / folded.step).to(torch.float64)
    return replace(folded, bias=bias), (folded.bias - bias) * folded.step


def migrate_weight(weight: Tensor, step: Tensor) -> Tensor:
    """W * s along the input channels (Eq. 5): [out, n] and [n] to [out, n]."""
    return weight * step.to(weight.dtype)

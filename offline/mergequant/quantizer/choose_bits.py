"""Which linears get 8 bits, by what their rounding adds to the loss of the model.

The full-precision model is run on calibration text, and its loss's gradients are carried back
through it, one block at a time; each linear's input and weight are rounded as the plan says, and
their errors are weighed by those gradients (`methods.sensitivity`).
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from mergequant.methods.clip import choose_token_clip
from mergequant.methods.gptq import round_to_nearest
from mergequant.methods.sensitivity import (
    MANY,
    Sensitivity,
    average_bits,
    input_damage,
    upgraded,
    weight_damage,
)
from mergequant.methods.weights import weight_grid
from mergequant.model.block import Block, LinearGradient
from mergequant.model.decoder import Decoder
from mergequant.options import Options
from mergequant.quantizer.inputs.dynamic import DynamicInputPlan
from mergequant.quantizer.inputs.record import stacked_weights
from mergequant.quantizer.inputs.static import StaticInputPlan, calibrate_channels
from mergequant.quantizer.plan import BlockPlan, Plan, ReadersPlan
from mergequant.quantizer.resolve import make_plan
from mergequant_vllm.format import matches
from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.token_quant.reference import token_codes
from mergequant_vllm.rounding import round_to_codes

logger = logging.getLogger("mergequant")

_TOKENS = 4096  # about so many tell linears apart
# What GPTQ leaves of the squared error of round to nearest: 0.43 on SmolLM2-135M, 0.30 to 0.45 by
# kind of linear.
_GPTQ = 0.43
# What is measured of the loss that is estimated, on SmolLM2-135M in W4A4: 0.304 of 0.71 nats a
# token, and 0.366 of 0.85 with neither graded rotation nor equalization; of the weights alone 0.144
# of 0.28. The Fisher information overestimates.
_MEASURED = 0.43

_WIDTHS = {"static_bits", "dynamic_bits", "weight_bits"}
Overrides = dict[str, dict[str, int]]


def resolve_bits(decoder: Decoder, windows: Tensor, options: Options, progress: bool) -> Overrides:
    """Fields that differ from `options`, by full name of the linear; none if nothing is asked for.

    Args:
        windows: token ids int64 [samples, length]; the first are used.
        options: with a rotation.
    """
    if options.average_bits is None and options.within is None:
        return {}
    plan = make_plan(decoder.architecture, decoder.reader.config, options.plain(), "")
    used = windows[: max(1, _TOKENS // windows.shape[1])]
    before = [_fixed_by(options, x) for x in measure(decoder, plan, used, progress)]
    after = upgraded(before, options.average_bits, options.within)
    for line in _summary(before, after):
        logger.info("%s", line)
    return dict(_overrides(before, after))


def _fixed_by(options: Options, linears: Sensitivity) -> Sensitivity:
    """The same, fixed where an override names one of its widths."""
    fields = {
        field
        for pattern, fields in options.overrides.items()
        if any(matches(pattern, name) for name in linears.linears)
        for field in fields
    }
    return replace(linears, fixed=not fields.isdisjoint(_WIDTHS))


def measure(decoder: Decoder, plan: Plan, windows: Tensor, progress: bool) -> list[Sensitivity]:
    """What rounding costs, for all linears that read one input, block by block from the last."""
    batches = decoder.embed(windows, len(windows), len(windows)).batches
    ids = torch.split(windows, [len(x) for x in batches])
    count = len(plan.blocks)
    found: list[Sensitivity] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        tqdm(total=2 * count, desc="Pilot, bits", unit="block", disable=not progress) as bar,
    ):
        # Hidden states wait on the disk: memory must not grow with the number of blocks.
        for number in range(count):
            save_file(dict(_numbered(batches)), _file(scratch, number))
            with decoder.block(number) as block:
                batches = [block.forward(hidden) for hidden in batches]
            bar.update()
        gradients = [decoder.loss_gradient(x, y) for x, y in zip(batches, ids, strict=True)]
        for number in reversed(range(count)):
            inputs = load_file(_file(scratch, number))
            batches = [inputs[str(index)].to(decoder.device) for index in range(len(gradients))]
            with decoder.block(number) as block:
                gradients, linears = _backward(block, plan.blocks[number], batches, gradients)
                found += _sensitivities(block, plan.blocks[number], linears, windows.numel())
            bar.update()
    return found


def _file(folder: str, number: int) -> Path:
    return Path(folder) / f"{number}.safetensors"


def _numbered(batches: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    for index, hidden in enumerate(batches):
        yield str(index), hidden.cpu().contiguous()


def _backward(
    block: Block, plan: BlockPlan, batches: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[list[Tensor], dict[str, LinearGradient]]:
    names = [name for readers in plan.readers for name in readers.weights]
    pairs = [
        block.backward(x, gradient, names) for x, gradient in zip(batches, gradients, strict=True)
    ]
    linears = {
        name: LinearGradient(
            *(
                torch.cat([getattr(seen[name], field) for _, seen in pairs])
                for field in ("x", "by_input", "by_output")
            )
        )
        for name in names
    }
    return [gradient for gradient, _ in pairs], linears


def _sensitivities(
    block: Block, plan: BlockPlan, linears: Mapping[str, LinearGradient], tokens: int
) -> Iterator[Sensitivity]:
    for readers in plan.readers:
        names = list(readers.weights)
        first = linears[names[0]]
        rounding = _round_input(block, readers, first.x)
        # The zero point's product is a constant of the unquantized weight.
        x, step = first.x - rounding.shift, rounding.step
        of_weights = 0.0
        for name, weight_plan in readers.weights.items():
            assert weight_plan is not None
            weight = block.weight(name) * step
            grid = weight_grid(weight, weight_plan.form, weight_plan.search)
            rounded = grid.dequantize(round_to_nearest(weight, grid))
            lost = (rounded - weight) / step
            damage = weight_damage(x, lost.to(x.dtype), linears[name].by_output)
            of_weights += damage * (_GPTQ if weight_plan.rounding == "gptq" else 1.0)
        yield Sensitivity(
            tuple(block.name_of(name) for name in names),
            isinstance(readers.input, StaticInputPlan),
            sum(block.weight(name).numel() for name in names),
            readers.input.bits,
            max(x.form.bits for x in readers.weights.values() if x is not None),
            _MEASURED * input_damage(rounding.error, first.by_input) / tokens,
            _MEASURED * of_weights / tokens,
        )


class _InputRounding(NamedTuple):
    """Rounding of an input, as far as the damage depends on it.

    Attributes:
        error: [tokens, n].
        step: [n], what migrates into the weights.
        shift: [n] or [1], what the code 0 stands for.
    """

    error: Tensor
    step: Tensor
    shift: Tensor


def _round_input(block: Block, readers: ReadersPlan, x: Tensor) -> _InputRounding:
    """Round an input [tokens, n] as the plan says."""
    names, plan = list(readers.weights), readers.input
    weights = stacked_weights(block, names)
    zero = x.new_zeros(1)
    if isinstance(plan, StaticInputPlan):
        calibration = calibrate_channels(plan, block, names[0], [x], weights)
        step = calibration.folded.step.to(x.dtype)
        shift = zero if calibration.shift is None else calibration.shift.to(x.dtype)
        error = round_to_codes((x - shift) / step, plan.bits) * step + shift - x
        return _InputRounding(error, step, shift)
    assert isinstance(plan, DynamicInputPlan)
    ratio = 1.0
    if plan.clip is not None:
        grid = plan.clip.grid()
        ratio = choose_token_clip([x], weights, grid, plan.bits, zero_points=plan.zero_points)
    codes, token_step, token_zero = token_codes(
        x, x.new_tensor([ratio]), plan.bits, CodeLayout.FLOAT32, zero_points=plan.zero_points
    )
    exact = codes if token_zero is None else codes - token_zero
    return _InputRounding(exact * token_step - x, torch.ones_like(x[0]), zero)


def _overrides(
    before: Sequence[Sensitivity], after: Sequence[Sensitivity]
) -> Iterator[tuple[str, dict[str, int]]]:
    for old, new in zip(before, after, strict=True):
        fields = {}
        if new.activation_bits != old.activation_bits:
            fields["static_bits" if new.static else "dynamic_bits"] = new.activation_bits
        if new.weight_bits != old.weight_bits:
            fields["weight_bits"] = new.weight_bits
        if fields:
            yield from ((name, fields) for name in new.linears)


def _summary(before: Sequence[Sensitivity], after: Sequence[Sensitivity]) -> Iterator[str]:
    """What was chosen, what it costs and what it saves, for people."""
    total = sum(x.multiplications for x in after)
    size = [sum(x.weight_bits * x.multiplications for x in part) for part in (before, after)]
    eight = sum(x.multiplications for x in after if x.activation_bits == MANY)
    damage = [sum(x.damage for x in part) for part in (before, after)]
    yield (
        f"Bits: {average_bits(after):.2f} of weights and inputs on average. {eight / total:.0%} of "
        f"the multiplications are by 8-bit inputs, at the speed of INT8; the weights grow by "
        f"{size[1] / size[0] - 1:.1%}. Rounding is estimated to cost {damage[1]:.3f} nats a token "
        f"instead of {damage[0]:.3f}, before training."
    )
    blocks: dict[tuple[str, str], list[int]] = {}
    for old, new in zip(before, after, strict=True):
        if new != old:
            number = next(int(part) for part in new.linears[0].split(".") if part.isdigit())
            names = ", ".join(x.rpartition(".")[2] for x in new.linears)
            form = f"W{new.weight_bits}A{new.activation_bits}"
            blocks.setdefault((names, form), []).append(number)
    for (names, form), numbers in sorted(blocks.items()):
        yield f"  {names}: {form} in blocks {', '.join(map(str, sorted(numbers)))}"

"""The options, resolved once: what each step does with each linear.

Nothing below this file looks at `Options`.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mergequant.model.architecture import Architecture, Norm, Readers
from mergequant.model.shapes import linear_shape
from mergequant.options import Options
from mergequant.output.checkpoint_plan import checkpoint_format
from mergequant.quantizer.columns import columns_plan
from mergequant.quantizer.forms import (
    channels_of,
    is_static,
    linear_forms,
    refuse_idle_budget,
    refuse_idle_patterns,
    rotation_of,
)
from mergequant.quantizer.inputs.carried import CarriedInputPlan
from mergequant.quantizer.inputs.dynamic import DynamicInputPlan
from mergequant.quantizer.inputs.record import ClipSearch, InputPlan
from mergequant.quantizer.inputs.static import ColumnsPlan, StaticInputPlan
from mergequant.quantizer.plan import (
    BlockPlan,
    Plan,
    ReadersPlan,
    Samples,
    TrainingPlan,
    WeightPlan,
)
from mergequant_vllm.format import LinearForm, WeightForm

# SmolLM2-135M: with 21 tokens a channel the error of the widest linears on held-out text is 1.29
# times that on the text that GPTQ saw, of all others 1.1 times; with 3 tokens it is 2.7 times.
# Where nothing is trained, half of them take two thirds of the time: it is the price asked for.
_TOKENS_A_CHANNEL, _UNTRAINED = 21, 10.5


def samples_of(
    options: Options, architecture: Architecture, config: Mapping[str, Any], length: int
) -> Samples:
    """Windows of `length` tokens for statistics, Hessians and training."""
    training = options.compensation_samples if options.compensated else 0
    hessians = options.gptq_samples
    if options.weights == "rtn":
        hessians = options.statistics_samples
    elif hessians is None:
        widest = max(linear_shape(architecture, x, config)[1] for x in architecture.linears)
        tokens = (_TOKENS_A_CHANNEL if options.compensated else _UNTRAINED) * widest
        hessians = max(options.statistics_samples, math.ceil(tokens / length))
    return Samples(options.statistics_samples, hessians, training)


def make_plan(
    architecture: Architecture,
    config: Mapping[str, Any],
    options: Options,
    calibration_sha256: str,
) -> Plan:
    """Resolve `options`, in which a pilot has decided what they left to be measured.

    Raises:
        InputError: a pattern matches nothing, a budget of bits allows nothing, linears that vLLM
            merges are not alike, or a form does not fit the model.
    """
    forms = dict(linear_forms(architecture, config, options))
    refuse_idle_patterns(architecture, options, forms)
    refuse_idle_budget(architecture, config, options, forms)
    checkpoint = checkpoint_format(architecture, config, options, forms, calibration_sha256)
    training = None
    if options.compensated:
        training = TrainingPlan(
            options.compensation_rank if options.compensation == "low_rank" else None,
            options.compensation_epochs,
            options.compensation_samples,
            options.compensation_learning_rate,
            options.seed,
        )
    blocks = []
    for number in range(checkpoint.blocks):
        prefix = f"{architecture.block.format(block=number)}."
        readers = tuple(_readers_plans(architecture, config, options, prefix, forms))
        blocks.append(BlockPlan(readers, checkpoint.block_linears(number), training))
    context = config.get("max_position_embeddings") or options.sequence_length
    length = min(options.sequence_length, context)
    return Plan(tuple(blocks), samples_of(options, architecture, config, length), checkpoint)


def _readers_plans(
    architecture: Architecture,
    config: Mapping[str, Any],
    options: Options,
    prefix: str,
    forms: Mapping[str, LinearForm | None],
) -> Iterator[ReadersPlan]:
    for readers in architecture.readers():
        group = [x.name for x in readers.linears if forms[f"{prefix}{x.name}"] is not None]
        if group:
            own = options.for_linear(f"{prefix}{group[0]}")
            plans = {x: _weight_plan(options, prefix, x, forms) for x in group}
            yield ReadersPlan(_input_plan(architecture, config, own, readers), plans)


def _input_plan(
    architecture: Architecture, config: Mapping[str, Any], own: Options, readers: Readers
) -> InputPlan:
    """How an input is calibrated whose readers have the options `own`."""
    if is_static(architecture, readers, own):
        if readers.norm is None:
            return CarriedInputPlan(own.static_bits)
        channels = channels_of(architecture, config, readers)
        return static_input_plan(own, readers.norm, columns_plan(own, channels))
    return DynamicInputPlan(
        bits=own.dynamic_bits,
        zero_points=own.dynamic_zero_points,
        clip=_clip_search(own) if own.clipping == "adaptive" else None,
        rotation=rotation_of(architecture, config, own, readers),
    )


def static_input_plan(own: Options, norm: Norm, columns: ColumnsPlan | None) -> StaticInputPlan:
    """How the output of `norm` is calibrated."""
    return StaticInputPlan(
        norm=norm,
        bits=own.static_bits,
        zero_points=own.static_zero_points,
        clip=None if own.clipping == "none" else _clip_search(own),
        columns=columns,
        weight_bits=own.weight_bits,
    )


def _clip_search(own: Options) -> ClipSearch:
    return ClipSearch(own.lowest_clip, own.clip_points)


def _weight_plan(
    options: Options, prefix: str, name: str, forms: Mapping[str, LinearForm | None]
) -> WeightPlan:
    form = forms[f"{prefix}{name}"]
    assert form is not None
    return weight_plan(options.for_linear(f"{prefix}{name}"), form.weight)


def weight_plan(own: Options, form: WeightForm) -> WeightPlan:
    """How a weight that is stored as `form` becomes codes."""
    return WeightPlan(
        form,
        own.weight_search,
        own.weights,
        own.damping,
        own.gptq_block,
        own.input_correction and own.weights == "gptq",
    )

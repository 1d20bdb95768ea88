"""The options, resolved once: what each step does with each linear, and what the checkpoint says.

Nothing below this file looks at `Options`: a step gets its own plan, in which nothing is left to be
decided but what the activations decide.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mergequant.errors import InputError
from mergequant.methods.rotate import OnlineRotation
from mergequant.methods.weights import Search
from mergequant.model.architecture import (
    Architecture,
    Norm,
    Readers,
    block_tensors,
    has_bias,
    linear_shape,
    outer_tensors,
    widths,
)
from mergequant.model.rotated_reader import online_rotations
from mergequant.options import Options
from mergequant.output.fingerprint import library_versions
from mergequant.quantizer.columns import columns_plan, segment_lengths
from mergequant.quantizer.head import BITS, HEAD_FORM
from mergequant.quantizer.inputs.dynamic import DynamicInputPlan
from mergequant.quantizer.inputs.record import ClipSearch, InputPlan
from mergequant.quantizer.inputs.static import ColumnsPlan, StaticInputPlan
from mergequant_vllm.format import (
    BLOCK,
    FORMAT_VERSION,
    QUANT_METHOD,
    CheckpointFormat,
    DynamicInput,
    LinearEntry,
    LinearForm,
    LinearFormat,
    Provenance,
    StaticInput,
    WeightForm,
    shortest_targets,
)


@dataclass(frozen=True)
class WeightPlan:
    """How one weight becomes codes.

    Attributes:
        form: how it is stored.
        search: how its steps are chosen, see `methods.weights`.
        rounding: `gptq` (paper 5), or `rtn`, round to nearest.
        damping: added to the Hessian's diagonal, as a fraction of its mean.
        gptq_block: columns that GPTQ updates at once.
    """

    form: WeightForm
    search: Search
    rounding: Literal["gptq", "rtn"]
    damping: float
    gptq_block: int


@dataclass(frozen=True)
class ReadersPlan:
    """The linears of a block that read one input and are quantized.

    Attributes:
        input: how that is calibrated.
        weights: by the linear's name within the block; None: the weight stays in floating point, a
            baseline that no checkpoint holds.
    """

    input: InputPlan
    weights: Mapping[str, WeightPlan | None]


@dataclass(frozen=True)
class TrainingPlan:
    """The compensation (paper 4.3).

    Attributes:
        rank: r of the low-rank matrices.
        epochs: most passes over the windows.
        samples: windows of text to train on, some of them held out.
        learning_rate: of AdamW, in weight steps; decays linearly to 0.
        seed: draws the matrices and the order of the windows.
    """

    rank: int
    epochs: int
    samples: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class BlockPlan:
    """One block: what reads what, in order of execution, and how it is stored.

    Attributes:
        readers: those of which something is quantized.
        formats: how each quantized linear is stored, by name within the block.
        training: None: nothing is trained.
    """

    readers: tuple[ReadersPlan, ...]
    formats: Mapping[str, LinearFormat]
    training: TrainingPlan | None

    @property
    def steps(self) -> int:
        """Steps of the progress bar: linears, and epochs of the training."""
        epochs = 0 if self.training is None or not self.formats else self.training.epochs
        return len(self.formats) + epochs


@dataclass(frozen=True)
class Samples:
    """How many windows of text each use takes, from the first on."""

    statistics: int
    hessians: int
    training: int


@dataclass(frozen=True)
class Plan:
    """A whole run.

    Attributes:
        blocks: of each block, in order.
        samples: windows of text.
        checkpoint: what is written.
    """

    blocks: tuple[BlockPlan, ...]
    samples: Samples
    checkpoint: CheckpointFormat


def samples_of(options: Options) -> Samples:
    """Windows for statistics, Hessians and training."""
    training = options.compensation_samples if options.compensated else 0
    return Samples(
        options.statistics_samples,
        options.gptq_samples if options.weights == "gptq" else options.statistics_samples,
        training,
    )


def make_plan(
    architecture: Architecture,
    config: Mapping[str, Any],
    options: Options,
    calibration_sha256: str,
) -> Plan:
    """Resolve `options`, in which a pilot has decided what they left to be measured.

    Raises:
        InputError: a pattern matches nothing, linears that vLLM merges are not alike, or a form
            does not fit the model.
    """
    forms = dict(_forms(architecture, config, options))
    _refuse_idle_patterns(options, forms)
    checkpoint = checkpoint_format(architecture, config, options, forms, calibration_sha256)
    training = None
    if options.compensated:
        training = TrainingPlan(
            options.compensation_rank,
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
    return Plan(tuple(blocks), samples_of(options), checkpoint)


def _forms(
    architecture: Architecture, config: Mapping[str, Any], options: Options
) -> Iterator[tuple[str, LinearForm | None]]:
    """What each linear of the model will be like, by full name; None: it is not quantized."""
    for number in range(int(config["num_hidden_layers"])):
        prefix = f"{architecture.block.format(block=number)}."
        for readers in architecture.readers():
            forms = {
                f"{prefix}{x.name}": _form(
                    architecture, config, options, readers, f"{prefix}{x.name}"
                )
                for x in readers.linears
            }
            if readers.norm is not None:
                _refuse_unlike(forms)
            yield from forms.items()
    head = architecture.head.name
    if f"{head}.weight" in outer_tensors(architecture, config):
        quantized = options.head_bits == BITS and not options.ignores(head)
        yield head, HEAD_FORM if quantized else None


def _form(
    architecture: Architecture,
    config: Mapping[str, Any],
    options: Options,
    readers: Readers,
    name: str,
) -> LinearForm | None:
    if options.ignores(name):
        return None
    own = options.for_linear(name)
    if _is_static(readers, own):
        return static_form(own, widths(config)[_width_of(architecture, readers.space)])
    rotation = _rotation(architecture, config, own, readers)
    return LinearForm(
        weight=_weight_form(own, None),
        input=DynamicInput(
            bits=own.dynamic_bits,
            zero_points=own.dynamic_zero_points,
            hadamard=rotation.hadamard,
            heads=rotation.heads,
        ),
    )


def static_form(own: Options, channels: int) -> LinearForm:
    """What a linear behind a norm of `channels` channels is like."""
    columns = columns_plan(own, channels)
    lengths = None
    if own.segments is not None:
        lengths = segment_lengths(channels if columns is None else columns.count, own.segments)
    staggered = columns is not None and columns.mode != "none" and columns.staggered
    return LinearForm(
        weight=_weight_form(own, lengths),
        input=StaticInput(
            bits=own.static_bits,
            zero_points=own.static_zero_points,
            columns=None if columns is None else columns.count,
            offsets=staggered or own.static_zero_points,
        ),
        output_offset="float32" if own.static_zero_points else None,
    )


def _weight_form(own: Options, segments: tuple[int, ...] | None) -> WeightForm:
    return WeightForm(
        bits=own.weight_bits,
        group_size=own.group_size,
        segments=segments,
        zero_points=own.asymmetric,
    )


def _readers_plans(
    architecture: Architecture,
    config: Mapping[str, Any],
    options: Options,
    prefix: str,
    forms: Mapping[str, LinearForm | None],
) -> Iterator[ReadersPlan]:
    for readers in architecture.readers():
        names = [x.name for x in readers.linears if forms[f"{prefix}{x.name}"] is not None]
        for group in [names] if readers.norm is not None else [[name] for name in names]:
            if group:
                own = options.for_linear(f"{prefix}{group[0]}")
                plans = {x: _weight_plan(options, prefix, x, forms) for x in group}
                yield ReadersPlan(_input_plan(architecture, config, own, readers), plans)


def _input_plan(
    architecture: Architecture, config: Mapping[str, Any], own: Options, readers: Readers
) -> InputPlan:
    """How an input is calibrated whose readers have the options `own`."""
    if _is_static(readers, own):
        assert readers.norm is not None
        channels = widths(config)[_width_of(architecture, readers.space)]
        return static_input_plan(own, readers.norm, columns_plan(own, channels))
    return DynamicInputPlan(
        bits=own.dynamic_bits,
        zero_points=own.dynamic_zero_points,
        clip=_clip_search(own) if own.clipping == "adaptive" else None,
        rotation=_rotation(architecture, config, own, readers),
    )


def static_input_plan(own: Options, norm: Norm, columns: ColumnsPlan | None) -> StaticInputPlan:
    """How the output of `norm` is calibrated."""
    return StaticInputPlan(
        norm=norm,
        bits=own.static_bits,
        zero_points=own.static_zero_points,
        step=own.activation_step,
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
    return WeightPlan(form, own.weight_search, own.weights, own.damping, own.gptq_block)


def _is_static(readers: Readers, own: Options) -> bool:
    return readers.norm is not None and own.activations == "static"


def _rotation(
    architecture: Architecture, config: Mapping[str, Any], own: Options, readers: Readers
) -> OnlineRotation:
    online = online_rotations(architecture, config, own.rotation, own.hadamard_block, own.mix_heads)
    return online.get(readers.linears[0].name, OnlineRotation())


def _width_of(architecture: Architecture, space: str) -> str:
    return next(entry.width for entry in architecture.spaces if entry.name == space)


def _refuse_unlike(forms: Mapping[str, LinearForm | None]) -> None:
    """Raise InputError where linears that vLLM merges are not alike."""
    first, *others = forms
    for other in others:
        if forms[other] != forms[first]:
            raise InputError(
                f"{first} and {other} must be quantized alike, because vLLM merges them into one "
                f"linear: give --ignore and --override a pattern that matches "
                f"{', '.join(name.rpartition('.')[2] for name in forms)} together."
            )


def _refuse_idle_patterns(options: Options, forms: Mapping[str, LinearForm | None]) -> None:
    """Raise InputError where a pattern matches no linear of the model."""
    for flag, patterns in (("--ignore", options.ignore), ("--override", options.overrides)):
        for pattern in patterns:
            only = Options(ignore=(pattern,))
            if not any(only.ignores(name) for name in forms):
                raise InputError(
                    f"{flag} {pattern!r} matches no linear of the model, whose linears are called "
                    f"like {next(iter(forms))}: correct the pattern."
                )


def checkpoint_format(
    architecture: Architecture,
    config: Mapping[str, Any],
    options: Options,
    forms: Mapping[str, LinearForm | None],
    calibration_sha256: str,
) -> CheckpointFormat:
    """The contract of the checkpoint that is going to be written."""
    linears = dict(_entries(architecture, config))
    named = {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    tensors = {
        name: list(shape)
        for name, shape in outer_tensors(architecture, config).items()
        if name not in named
    }
    for name, shape in block_tensors(architecture, config).items():
        if f"{architecture.block}.{name}" not in named:
            tensors[f"{architecture.block}.{name}"] = list(shape)
    return CheckpointFormat(
        quant_method=QUANT_METHOD,
        format_version=FORMAT_VERSION,
        block=architecture.block,
        blocks=int(config["num_hidden_layers"]),
        targets=shortest_targets(forms, _roles(architecture, forms)),
        linears=linears,
        tensors=tensors,
        provenance=Provenance(
            options=options.model_dump(mode="json"),
            versions=library_versions(),
            calibration_sha256=calibration_sha256,
        ),
    )


def _entries(
    architecture: Architecture, config: Mapping[str, Any]
) -> Iterator[tuple[str, LinearEntry]]:
    """Every linear of the model, by full name with `{block}`."""
    assert BLOCK in architecture.block
    for readers in architecture.readers():
        norm = None if readers.norm is None else f"{architecture.block}.{readers.norm.name}"
        for linear in readers.linears:
            yield (
                f"{architecture.block}.{linear.name}",
                LinearEntry(
                    shape=linear_shape(architecture, linear, config),
                    bias=has_bias(linear, config),
                    norm=norm,
                ),
            )
    head = architecture.head.name
    shape = outer_tensors(architecture, config).get(f"{head}.weight")
    if shape is not None:
        yield head, LinearEntry(shape=(shape[0], shape[1]))


def _roles(architecture: Architecture, forms: Mapping[str, object]) -> dict[str, str]:
    """What each linear is called with `{block}` for its block's number, by full name."""
    inside = [linear.name for linear in architecture.linears]
    roles = {}
    for name in forms:
        role = next((x for x in inside if name.endswith(f".{x}")), None)
        roles[name] = name if role is None else f"{architecture.block}.{role}"
    return roles

"""What each linear of a model will be like, and whether that can be served."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergequant.errors import InputError
from mergequant.methods.rotate import OnlineRotation
from mergequant.model.architecture import MIDDLE, Architecture, Readers
from mergequant.model.equalized_reader import is_carried
from mergequant.model.rotated_reader import online_rotations
from mergequant.model.shapes import has_bias, linear_shape, outer_tensors
from mergequant.options import DYNAMIC_ONLY, STATIC_ONLY, Options
from mergequant.quantizer.columns import columns_plan, segment_lengths
from mergequant.quantizer.head import BITS, HEAD_FORM
from mergequant_vllm.format import DynamicInput, LinearForm, StaticInput, WeightForm, matches

# Columns of down that share a weight step where up's rows carry the steps of its input, which make
# its columns uneven. SmolLM2-135M, with nothing but down in 8 bits, loses 0.061 nats with one
# weight step for each output channel, 0.011 with groups of so many (benchmarks.method.carried).
CARRIED_GROUP = 64


def linear_forms(
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
            _refuse_unlike(forms)
            if architecture.bare_inputs:
                _refuse_described(readers, forms)
            yield from forms.items()
    head = architecture.head.name
    if f"{head}.weight" in outer_tensors(architecture, config):
        yield head, HEAD_FORM if quantizes_head(architecture, options) else None


def quantizes_head(architecture: Architecture, options: Options) -> bool:
    """Whether the head gets 8 bits: it is asked for, and vLLM's class can serve it."""
    return asks_for_head(architecture, options) and architecture.served_head == "any"


def asks_for_head(architecture: Architecture, options: Options) -> bool:
    """Whether the head is asked for in 8 bits."""
    return options.head_bits == BITS and not options.ignores(architecture.head.name)


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
    if is_static(architecture, readers, own):
        if readers.norm is None:
            chosen = own.group_size is not None or options.overrides_field("group_size", name)
            return _carried_form(own, readers, chosen)
        adds = has_bias(readers.norm, config)
        return static_form(own, channels_of(architecture, config, readers), adds)
    rotation = rotation_of(architecture, config, own, readers)
    return LinearForm(
        weight=_weight_form(own, None),
        input=DynamicInput(
            bits=own.dynamic_bits,
            zero_points=own.dynamic_zero_points,
            hadamard=rotation.hadamard,
            heads=rotation.heads,
        ),
    )


def _carried_form(own: Options, readers: Readers, chosen: bool) -> LinearForm:
    """What o and down are like whose inputs' steps v and up carry; `chosen`: the group size is."""
    if readers.space == MIDDLE and not chosen:
        own = own.model_copy(update={"group_size": CARRIED_GROUP})
    return LinearForm(weight=_weight_form(own, None), input=StaticInput(bits=own.static_bits))


def static_form(own: Options, channels: int, norm_adds: bool) -> LinearForm:
    """What a linear behind a norm of `channels` channels is like.

    Args:
        norm_adds: the norm has a bias, which takes the channels' zero points in.
    """
    columns = columns_plan(own, channels)
    lengths = None
    if own.segments is not None:
        lengths = segment_lengths(channels if columns is None else columns.count, own.segments)
    offsets = own.static_zero_points and not norm_adds
    staggered = columns is not None and columns.mode != "none" and columns.staggered
    return LinearForm(
        weight=_weight_form(own, lengths),
        input=StaticInput(
            bits=own.static_bits,
            zero_points=offsets,
            columns=None if columns is None else columns.count,
            offsets=staggered or offsets,
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


def is_static(architecture: Architecture, readers: Readers, own: Options) -> bool:
    """Whether linears of the options `own` have static activations.

    A norm carries their steps, or, if that is asked for, the linear that writes their channels.
    """
    if readers.norm is None:
        return own.activations == "fully_static" and is_carried(architecture, readers.space)
    return own.activations != "dynamic"


def rotation_of(
    architecture: Architecture, config: Mapping[str, Any], own: Options, readers: Readers
) -> OnlineRotation:
    """What the server does to the input of `readers` before it quantizes it."""
    online = online_rotations(
        architecture, config, own.decided_rotation, own.hadamard_block, own.mix_heads
    )
    return online.get(readers.linears[0].name, OnlineRotation())


def channels_of(architecture: Architecture, config: Mapping[str, Any], readers: Readers) -> int:
    """Channels of the input that `readers` share."""
    return linear_shape(architecture, readers.linears[0], config)[1]


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


def _refuse_described(readers: Readers, forms: Mapping[str, LinearForm | None]) -> None:
    """Raise InputError where a fused linear would store tensors of its input."""
    for linear, (name, form) in zip(readers.linears, forms.items(), strict=True):
        if form is None or len(linear.written) == 1:
            continue
        if not isinstance(form.input, StaticInput) or form.input.columns or form.input.offsets:
            raise InputError(
                f"vLLM reorders every tensor of {name} as it loads it, so its input can have no "
                "columns, offsets or clip ratio: give --activations static --reconstruction none "
                f"and no --segments, or --ignore 're:.*{linear.name}$'."
            )


def refuse_idle_patterns(
    architecture: Architecture, options: Options, forms: Mapping[str, LinearForm | None]
) -> None:
    """Raise InputError where a pattern matches no linear of the model, or changes none of them."""
    names = {*forms, architecture.head.name}  # a tied head may be named, though it is no tensor
    for flag, patterns in (("--ignore", options.ignore), ("--override", options.overrides)):
        for pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                raise InputError(
                    f"{flag} {pattern!r} matches no linear of the model, whose linears are called "
                    f"like {next(iter(forms))}: correct the pattern."
                )
    behind_norms = tuple(
        f".{linear.name}"
        for readers in architecture.readers()
        for linear in readers.linears
        if readers.norm is not None
    )
    for pattern, fields in options.overrides.items():
        matched = [form for name, form in forms.items() if matches(pattern, name)]
        inputs = [form.input for form in matched if form is not None and form is not HEAD_FORM]
        normed = any(
            matches(pattern, name) and forms[name] is not None
            for name in forms
            if name.endswith(behind_norms)
        )
        if not inputs:
            raise InputError(
                f"--override {pattern!r} matches only linears that it cannot change: what --ignore "
                "leaves in 16 bits, or the head, which only --head-bits quantizes: leave it out."
            )
        for field, value in fields.items():
            if field == "activations" and options.activations == "fully_static":
                continue  # of linears whose steps v and up would carry: a step per token instead
            _refuse_idle_field(pattern, field, value, inputs)
            if field in STATIC_ONLY and field != "static_bits" and not normed:
                raise InputError(
                    f"--override {pattern!r} sets {field}, which means something behind a norm "
                    f"alone, and none of the linears that it matches reads one: leave {field} out, "
                    "or correct the pattern."
                )


def refuse_idle_budget(
    architecture: Architecture,
    config: Mapping[str, Any],
    options: Options,
    forms: Mapping[str, LinearForm | None],
) -> None:
    """Raise InputError where `average_bits` is less than what the other options give already."""
    if options.average_bits is None:
        return
    spent = multiplications = 0.0
    for number in range(int(config["num_hidden_layers"])):
        for linear in architecture.linears:
            form = forms[f"{architecture.block.format(block=number)}.{linear.name}"]
            if form is not None:
                size = math.prod(linear_shape(architecture, linear, config))
                spent += size * (form.weight.bits + form.input.bits) / 2
                multiplications += size
    if spent > options.average_bits * multiplications * (1 + 1e-9):
        raise InputError(
            f"--average-bits {options.average_bits:g} is less than the "
            f"{spent / multiplications:.2f} bits that weights and inputs have by other options: "
            "give more, or leave it out; --best is --average-bits 5."
        )


def _refuse_idle_field(
    pattern: str, field: str, value: object, inputs: Sequence[StaticInput | DynamicInput]
) -> None:
    """Raise InputError where an override's field means nothing to any linear that it matches."""
    if field in STATIC_ONLY or (field == "activations" and value != "dynamic"):
        kind, meant = "static", any(isinstance(x, StaticInput) for x in inputs)
    elif field in DYNAMIC_ONLY:
        kind, meant = "per-token", any(isinstance(x, DynamicInput) for x in inputs)
    else:
        return
    if not meant:
        raise InputError(
            f"--override {pattern!r} sets {field}, but none of the linears that it matches has "
            f"{kind} activations: leave {field} out, or correct the pattern."
        )

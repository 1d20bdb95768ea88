"""The command line's options that are fields of `Options`, made from the fields themselves."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from mergequant.errors import InputError
from mergequant.options import Options
from mergequant.recipe import load_recipe

HELP = {
    "activations": "static (steps in norms), fully_static (in v and up too) or dynamic (baseline).",
    "rotation": "none, offline, online, or auto: what measures best.",
    "residual_rotation": "full, or graded: channels of like variance only are mixed.",
    "equalization": "o's and down's channels are brought to like size by v's and up's rows.",
    "hadamard_block": "Largest block of the online rotation.",
    "mix_heads": "Heads mixed together at o's input (with rotation online); 0: none.",
    "static_bits": "Bits of static activations: 4, 6 or 8.",
    "dynamic_bits": "Bits of those per token (o, down): 4, 6 or 8.",
    "static_zero_points": "Norm-fed activations with a zero point a channel.",
    "dynamic_zero_points": "o's and down's with a zero point a token.",
    "reconstruction": "none, prune, pad, or auto: what measures best.",
    "alpha": "Threshold of a strong channel (Eq. 6): a number, architecture, or auto.",
    "split_by": "What Eq. 6 measures: step or folded.",
    "staggered": "Copies round at different offsets.",
    "max_extra_channels": "Growth of K allowed to pad, as a fraction.",
    "weights": "gptq or rtn (round to nearest).",
    "input_correction": "Weights are fitted to their rounded input before GPTQ.",
    "weight_bits": "3, 4, 6 or 8.",
    "group_size": "Channels that share a weight step (of a fully static down: 64).",
    "segments": "Weight steps along K of norm-fed linears, whose columns are sorted.",
    "asymmetric": "Weights with zero points.",
    "weight_search": "Weight steps: minmax or mse.",
    "head_bits": "8, or 16: as it is, for rerankers and EAGLE.",
    "clipping": "none, channel or adaptive.",
    "compensation": "What is trained: elementwise, or low_rank (the paper's).",
    "compensation_rank": "Rank of low_rank; 0: nothing is trained.",
    "compensation_epochs": "Most passes of the training.",
    "compensation_samples": "Windows to train on.",
    "compensation_learning_rate": "Of AdamW, in weight steps.",
    "statistics_samples": "Windows for steps and clips.",
    "gptq_samples": "Windows for GPTQ; by default by the model's width.",
    "sequence_length": "Tokens in a window.",
    "damping": "Fraction of the Hessian's diagonal.",
    "gptq_block": "Columns that GPTQ updates at once.",
    "lowest_clip": "Smallest clip ratio tried.",
    "clip_points": "Clip ratios tried.",
    "average_bits": "Spend up to so many bits on average: 8 where that saves most (4 to 8).",
    "within": "Spend bits until the loss added is estimated to be this, in nats a token.",
    "ignore": "Linears that stay in 16 bits: a name, or re:PATTERN. Repeatable.",
    "overrides": "What differs for some: weight_bits=8,static_bits=8@re:PATTERN. Repeatable.",
    "seed": "Picks the calibration windows.",
    "device": "cpu, cuda, or auto.",
}

# In `--help`: what people use beside the arguments, what the method is about, and the rest.
COMMON: tuple[str, ...] = (
    "average_bits",
    "within",
    "weight_bits",
    "static_bits",
    "dynamic_bits",
    "head_bits",
)
COMMON += ("ignore", "overrides", "seed", "device")
METHOD: tuple[str, ...] = (
    "activations",
    "rotation",
    "residual_rotation",
    "equalization",
    "mix_heads",
)
METHOD += ("static_zero_points", "dynamic_zero_points", "reconstruction", "alpha", "weights")
METHOD += ("group_size", "segments", "asymmetric", "clipping", "compensation", "input_correction")

# What the rows of an ablation take from the command line; the rest is what they are about.
BASE_FLAGS = (
    "hadamard_block",
    "reconstruction",
    "alpha",
    "split_by",
    "staggered",
    "max_extra_channels",
    "compensation_rank",
    "compensation_epochs",
    "compensation_samples",
    "compensation_learning_rate",
    "statistics_samples",
    "gptq_samples",
    "sequence_length",
    "damping",
    "seed",
    "device",
)


def with_option_flags(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, which takes them as `**flags`, a flag for each field named, or for all."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(command).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        last = inspect.Parameter.KEYWORD_ONLY
        flags = [
            inspect.Parameter(name, last, default=_default(name), annotation=_annotation(name))
            for name in names or Options.model_fields
        ]
        command.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        return command

    return decorate


def read_options(flags: Mapping[str, Any], **changes: Any) -> Options:
    """Options of the flags, `changes` over them; raises InputError that names the wrong flag."""
    given = {**flags, **changes}
    if "overrides" in given:
        given["overrides"] = _read_overrides(given["overrides"])
    try:
        return Options.model_validate(given)
    except ValidationError as error:
        faults = error.errors()
        field = faults[0]["loc"][:1]
        where = _flag(str(field[0])) if field else "Options:"
        # A field of several types has a fault for each.
        messages = " or ".join(fault["msg"] for fault in faults if fault["loc"][:1] == field)
        raise InputError(f"{where} is wrong: {messages}.") from error


def over_recipe(
    context: typer.Context, flags: Mapping[str, Any], recipe: str | None
) -> dict[str, Any]:
    """The flags, those of a recipe in the place of those that the command line leaves out.

    Args:
        context: of the command, which knows where each flag is from.

    Raises:
        InputError: there is no such recipe.
    """
    if recipe is None:
        return dict(flags)
    options = load_recipe(recipe)
    if "overrides" in options:  # as flags spell them
        spelling = spelled({"overrides": options["overrides"]})
        options["overrides"] = [word for word in spelling if word != _flag("overrides")]
    sources = {name: context.get_parameter_source(name) for name in flags}
    given = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    return {**flags, **{name: x for name, x in options.items() if name not in given}}


BEST = {"average_bits": 5.0}  # what --best changes of the defaults


def at_price(flags: Mapping[str, Any], *, fast: bool, best: bool) -> Options:
    """Options of the flags at one of three prices: `--fast`, the default, `--best`.

    A budget of bits among the flags counts over that of `--best`.
    """
    if fast and best:
        raise InputError("--fast and --best are two prices: give one of them.")
    if fast:
        return read_options(flags, compensation_rank=0)
    asked = flags.get("average_bits") is not None or flags.get("within") is not None
    return read_options(flags, **(BEST if best and not asked else {}))


def _read_overrides(spelled: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`field=value,field=value@pattern`, several times, as `Options.overrides` has it."""
    overrides: dict[str, dict[str, Any]] = {}
    for text in spelled:
        fields, at, pattern = text.partition("@")
        pairs = [field.partition("=") for field in fields.split(",")]
        if not at or not pattern or not all(name and value for name, _, value in pairs):
            raise InputError(
                f"--override {text!r} is not understood: write it as "
                "weight_bits=8,static_bits=8@re:PATTERN, or @NAME for one linear."
            )
        named = {
            name.strip().replace("-", "_"): _read_value(value.strip()) for name, _, value in pairs
        }
        overrides.setdefault(pattern, {}).update(named)
    return overrides


def _read_value(text: str) -> Any:
    """A number, true, false, null, or a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _flag(name: str) -> str:
    """A field's flag; one that is given several times is named in the singular."""
    return "--override" if name == "overrides" else "--" + name.replace("_", "-")


def _default(name: str) -> Any:
    default = Options.model_fields[name].get_default(call_default_factory=True)
    if _type(name) == list[str]:
        return []
    return str(default) if _type(name) is str else default


def _annotation(name: str) -> Any:
    flags = [_flag(name)] if name == "overrides" else []
    panel = None if name in COMMON else "Method" if name in METHOD else "Advanced"
    return Annotated[_type(name), typer.Option(*flags, help=HELP[name], rich_help_panel=panel)]


def _type(name: str) -> Any:
    """Type of a flag: words stay words here, `Options` says which are known."""
    if name in ("ignore", "overrides"):
        return list[str]
    annotation = Options.model_fields[name].annotation
    if annotation in (bool, int, float, int | None, float | None):
        return annotation
    choice_of_numbers = isinstance(Options.model_fields[name].default, int)  # such as 4 or 8
    return int if choice_of_numbers else str


def spelled(options: Mapping[str, Any]) -> list[str]:
    """Words of the command line that ask for these options, where they are not the defaults."""
    words: list[str] = []
    for name, value in options.items():
        default = Options.model_fields[name].get_default(call_default_factory=True)
        if value == default or value is None:
            continue
        if name == "overrides":
            for pattern, fields in value.items():
                pairs = ",".join(
                    f"{key}={json.dumps(x).strip(chr(34))}" for key, x in fields.items()
                )
                words += [_flag(name), f"{pairs}@{pattern}"]
        elif isinstance(value, bool):
            words.append(_flag(name) if value else f"--no-{_flag(name)[2:]}")
        elif isinstance(value, list):
            words += [word for entry in value for word in (_flag(name), str(entry))]
        else:
            words += [_flag(name), str(value)]
    return words

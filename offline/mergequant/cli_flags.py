"""The command line's options that are fields of `Options`, made from the fields themselves."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from mergequant.errors import InputError
from mergequant.options import Options

HELP = {
    "activations": "static (steps folded into the norms) or dynamic (baseline).",
    "activation_step": "channel, or a baseline: tensor, smooth.",
    "mix_activations": "o's and down's step: token, or tensor (ablation only).",
    "rotation": "none, offline or online.",
    "hadamard_block": "Largest block of the online rotation.",
    "static_bits": "Bits of norm-fed activations: 4 or 8.",
    "dynamic_bits": "Bits of o's and down's: 4 or 8.",
    "reconstruction": "none, prune, pad, or auto: what measures best.",
    "alpha": "Threshold of a strong channel (Eq. 6): a number, architecture, or auto.",
    "split_by": "What Eq. 6 measures: step or folded.",
    "staggered": "Copies round at different offsets.",
    "max_extra_channels": "Growth of K allowed to pad, as a fraction.",
    "weights": "gptq, rtn (round to nearest), or none (16 bits, ablation only).",
    "weight_bits": "3, 4 or 8.",
    "group_size": "Channels that share a weight step.",
    "asymmetric": "Weights with zero points.",
    "weight_search": "Weight steps: minmax or mse.",
    "head_bits": "8 or 16: as it is.",
    "clipping": "none, channel or adaptive.",
    "compensation_rank": "Rank of the trained low-rank matrices; 0: none.",
    "compensation_epochs": "Most passes of the training.",
    "compensation_samples": "Windows to train on.",
    "compensation_learning_rate": "Of AdamW, in weight steps.",
    "statistics_samples": "Windows for steps and clips.",
    "gptq_samples": "Windows for GPTQ.",
    "sequence_length": "Tokens in a window.",
    "damping": "Fraction of the Hessian's diagonal.",
    "gptq_block": "Columns that GPTQ updates at once.",
    "lowest_clip": "Smallest clip ratio tried.",
    "clip_points": "Clip ratios tried.",
    "seed": "Picks the calibration windows.",
    "device": "cpu, cuda, or auto.",
}

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
    try:
        return Options.model_validate({**flags, **changes})
    except ValidationError as error:
        faults = error.errors()
        field = faults[0]["loc"][:1]
        where = "--" + str(field[0]).replace("_", "-") if field else "Options:"
        # A field of several types has a fault for each.
        messages = " or ".join(fault["msg"] for fault in faults if fault["loc"][:1] == field)
        raise InputError(f"{where} is wrong: {messages}.") from error


def _default(name: str) -> Any:
    default = Options.model_fields[name].default
    return str(default) if _type(name) is str else default


def _annotation(name: str) -> Any:
    return Annotated[_type(name), typer.Option(help=HELP[name])]


def _type(name: str) -> Any:
    """Words stay words here; `Options` says which are known."""
    annotation = Options.model_fields[name].annotation
    if annotation in (bool, int, float, int | None):
        return annotation
    choice_of_numbers = isinstance(Options.model_fields[name].default, int)  # such as 4 or 8
    return int if choice_of_numbers else str

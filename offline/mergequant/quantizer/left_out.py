"""What is asked for and the model type does not allow, or what loses much: said once, at first."""

from collections.abc import Iterator, Mapping
from typing import Any

from mergequant.model.architecture import MIDDLE, Architecture
from mergequant.model.equalized_reader import is_carried
from mergequant.model.positions import served_otherwise
from mergequant.model.rotated_reader import fixed_residual
from mergequant.model.settled_config import embeds
from mergequant.model.windows import windows_served_otherwise
from mergequant.options import Options
from mergequant.quantizer.forms import asks_for_head, is_static, quantizes_head

_WIDE = 8


def left_out(
    architecture: Architecture, options: Options, config: Mapping[str, Any]
) -> Iterator[str]:
    """A sentence for each thing that is left out, loses much or is served otherwise."""
    yield from served_otherwise(config)
    yield from windows_served_otherwise(architecture, config)
    yield from embeds(config)
    fixed = fixed_residual(architecture)
    if fixed is not None and options.rotation != "none":
        yield f"The residual is not rotated (R1): {fixed}"
    if asks_for_head(architecture, options) and not quantizes_head(architecture, options):
        yield f"The head stays in 16 bits: vLLM serves {architecture.model_type} with no other"
    static = [x.norm for x in architecture.readers() if x.norm is not None]
    if not static and options.activations != "dynamic":
        yield (
            f"No norm of {architecture.model_type} stands in front of a linear: "
            "what reads the residual gets a step per token, and nothing is reconstructed"
        )
    if options.activations == "fully_static" and options.dynamic_bits not in (
        Options().dynamic_bits,
        options.static_bits,
    ):
        yield (
            f"o's and down's inputs are static and have {options.static_bits} bits as the others: "
            "--dynamic-bits is for those that are not"
        )
    if options.activations == "fully_static" and not is_carried(architecture, MIDDLE):
        yield (
            f"An activation function stands between the MLP's two linears of "
            f"{architecture.model_type}: the second one's input gets a step per token"
        )
    if narrow := list(_narrow(architecture, options)):
        yield (
            f"Static steps that v and up carry lose much below {_WIDE} bits (SmolLM2-135M, W4A4: "
            "1.15 nats a token, with steps per token 0.34; 6 bits were not measured): give "
            "--static-bits 8, or "
            + " ".join(f"--override 'static_bits=8@re:.*{name}'" for name in narrow)
        )


def _narrow(architecture: Architecture, options: Options) -> Iterator[str]:
    """Linears of fewer bits whose steps v and up carry, by their names within a block."""
    block = architecture.block.format(block=0)
    for readers in architecture.readers():
        for linear in readers.linears if readers.norm is None else ():
            name = f"{block}.{linear.name}"
            own = options.for_linear(name)
            narrow = is_static(architecture, readers, own) and own.static_bits < _WIDE
            if narrow and not options.ignores(name):
                yield linear.name

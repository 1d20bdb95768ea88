"""What the options ask for and the model type does not allow: said once, before the work."""

from collections.abc import Iterator

from mergequant.model.architecture import MIDDLE, Architecture
from mergequant.model.equalized_reader import is_carried
from mergequant.model.rotated_reader import fixed_residual
from mergequant.options import Options
from mergequant.quantizer.forms import asks_for_head, quantizes_head


def left_out(architecture: Architecture, options: Options) -> Iterator[str]:
    """A sentence for each thing that is left out."""
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

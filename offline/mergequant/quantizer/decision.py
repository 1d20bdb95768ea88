"""What a pilot decides of what the options leave to be measured."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from mergequant.errors import InputError
from mergequant.model.architecture import Architecture
from mergequant.model.rotated_reader import fixed_residual, online_rotations
from mergequant.model.shapes import paper_alpha, widths
from mergequant.options import Options, Rotation
from mergequant.quantizer.columns import padded_columns


class Decision(BaseModel):
    """What the options left to be measured: fields of `Options`, decided.

    Attributes:
        bits: by full name of a linear, the widths that `average_bits` or `within` gave it.
        plain_loss: of the source model on the pilot's text, nats a token; None: not measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rotation: Rotation
    reconstruction: Literal["none", "prune", "pad"]
    alpha: float = Field(ge=0)
    max_extra_channels: float = Field(gt=0)
    bits: dict[str, dict[str, int]] = Field(default_factory=dict)
    plain_loss: float | None = None

    def applied_to(self, options: Options) -> Options:
        """`options` with nothing left to be measured."""
        overrides = with_bits(options.overrides, self.bits)
        return options.model_copy(
            update={
                **self.model_dump(exclude={"bits", "plain_loss"}),
                "overrides": overrides,
            }
        )

    @classmethod
    def read(cls, kept: Mapping[str, Any]) -> "Decision | None":
        """What a run that was interrupted has kept; None: nothing.

        Raises:
            InputError: it is none.
        """
        if not kept:
            return None
        try:
            return cls.model_validate(dict(kept))
        except ValidationError as error:
            raise InputError(
                f"The unfinished run's decision.json is damaged ({error.errors()[0]['msg']}): "
                "remove the output folder's .partial and begin again."
            ) from error

    @classmethod
    def largest(
        cls, options: Options, architecture: Architecture, config: Mapping[str, Any]
    ) -> Options:
        """`options` with the largest of what a pilot may decide."""
        channels = widths(config)["hidden"]
        mode = options.reconstruction
        if mode == "auto" and architecture.bare_inputs:
            mode = "none"
        elif mode == "auto":
            mode = "pad" if padded_columns(options, channels) > channels else "prune"
        alpha = options.alpha if isinstance(options.alpha, float) else paper_alpha(config)
        return cls(
            rotation=possible_rotations(architecture, config, options)[0],
            reconstruction=mode,
            alpha=alpha,
            max_extra_channels=options.max_extra_channels,
        ).applied_to(options)


def with_bits(
    overrides: Mapping[str, Mapping[str, JsonValue]], bits: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, JsonValue]]:
    """Overrides of the user with the widths that were chosen, which count over them."""
    merged = {name: {**overrides.get(name, {}), **fields} for name, fields in bits.items()}
    return {**{key: dict(value) for key, value in overrides.items() if key not in bits}, **merged}


def possible_rotations(
    architecture: Architecture, config: Mapping[str, Any], options: Options
) -> tuple[Rotation, ...]:
    """What `rotation` allows, the furthest first; of `auto`, what the architecture does.

    Raises:
        InputError: what is asked for is not possible.
    """
    if options.rotation != "auto":
        return (options.rotation,)
    if options.activations == "fully_static":  # v, up and what they feed stay as they are
        return ("none",) if fixed_residual(architecture) is not None else ("offline", "none")
    try:
        online_rotations(architecture, config, "online", options.hadamard_block, options.mix_heads)
    except InputError:
        if options.mix_heads:
            raise
        return ("offline", "none")
    return ("online", "none")

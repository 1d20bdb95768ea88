"""What one quantized linear is like: its weight, its input, and the constant that is added."""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mergequant_vllm.kernels.linear.spans import span_slices
from mergequant_vllm.packing import STREAM_CODES


class FormatError(ValueError):
    """A checkpoint that breaks the contract; the message is one sentence for the user."""


class Strict(BaseModel):
    """A frozen record in which an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightForm(Strict):
    """How a weight is stored.

    Attributes:
        bits: width of a code.
        group_size: input channels that share a weight step, the last group may be short; None: one
            step per output channel, unless there are segments.
        segments: lengths of the runs of columns that share a weight step; all but the last are
            multiples of 32, so that no run begins within a packed word.
        zero_points: codes are asymmetric.
    """

    bits: Literal[3, 4, 6, 8] = 4
    group_size: int | None = Field(default=None, ge=STREAM_CODES, multiple_of=STREAM_CODES)
    segments: tuple[int, ...] | None = Field(default=None, min_length=2)
    zero_points: bool = False

    @model_validator(mode="after")
    def _steps_along_k(self) -> Self:
        if self.segments is None:
            return self
        if self.group_size is not None:
            raise ValueError("a weight has groups or segments, not both")
        if min(self.segments) < 1 or any(x % STREAM_CODES for x in self.segments[:-1]):
            raise ValueError(f"segments but the last are multiples of {STREAM_CODES} columns")
        return self


class StaticInput(Strict):
    """Activation steps per channel, folded into what writes the channels.

    That is the norm that the linear reads; or, where it reads none, the linear whose rows its
    channels' sizes come from: v for o, up for down.

    Attributes:
        bits: width of an activation code.
        zero_points: codes are asymmetric: `input_offset` holds -z/s, `output_offset` W z.
        columns: K after reconstruction, with `input_index` stored; None: the channels as they are.
        offsets: `input_offset` is stored: staggered rounding, zero points, or both.
    """

    kind: Literal["static"] = "static"
    bits: Literal[4, 6, 8] = 4
    zero_points: bool = False
    columns: int | None = Field(default=None, ge=1)
    offsets: bool = False

    @model_validator(mode="after")
    def _zero_points_are_offsets(self) -> Self:
        if self.zero_points and not self.offsets:
            raise ValueError("zero points of a static input are stored as offsets")
        return self


class DynamicInput(Strict):
    """A step per token, found by the server.

    Attributes:
        bits: width of an activation code.
        zero_points: a zero point per token too.
        hadamard: block of the online rotation of the input, a power of two; None: none.
        heads: (heads that are mixed together, channels of a head); each run of so many channels is
            mixed across its heads first; None: none is.
    """

    kind: Literal["dynamic"] = "dynamic"
    bits: Literal[4, 6, 8] = 4
    zero_points: bool = False
    hadamard: int | None = Field(default=None, ge=2)
    heads: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _rotation_is_possible(self) -> Self:
        if self.hadamard is not None and self.hadamard & (self.hadamard - 1):
            raise ValueError(f"hadamard block {self.hadamard} is no power of two")
        if self.heads is not None and min(self.heads) < 2:
            raise ValueError(f"{list(self.heads)} are no heads to be mixed")
        return self

    @property
    def heads_run(self) -> int | None:
        """Channels that are mixed together; None: none are."""
        return None if self.heads is None else self.heads[0] * self.heads[1]


InputForm = Annotated[StaticInput | DynamicInput, Field(discriminator="kind")]


class LinearForm(Strict):
    """What the linears that a target matches are like.

    Attributes:
        weight: how the weight is stored.
        input: how activations become codes.
        output_offset: dtype of the stored constant [out] that the server adds whether the linear
            has a bias or not; None: there is none.
    """

    weight: WeightForm = WeightForm()
    input: InputForm
    output_offset: Literal["bfloat16", "float32"] | None = None

    @model_validator(mode="after")
    def _zero_points_have_a_constant(self) -> Self:
        static = isinstance(self.input, StaticInput)
        if static and self.input.zero_points and self.output_offset is None:
            raise ValueError("a static input with zero points needs an output_offset")
        return self


@dataclass(frozen=True)
class LinearFormat:
    """One quantized linear of a model: what its target says, and what the model says.

    Attributes:
        shape: (out, in) of the source model's weight.
        bias: whether it has one.
        norm: full name of the norm that it reads; None: it reads something else.
        weight: how the weight is stored.
        input: how activations become codes.
        output_offset: see `LinearForm`.
    """

    shape: tuple[int, int]
    bias: bool
    norm: str | None
    weight: WeightForm
    input: StaticInput | DynamicInput
    output_offset: Literal["bfloat16", "float32"] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where what the target says does not fit the linear."""
        if isinstance(self.input, StaticInput):
            described = self.input.columns is not None or self.input.offsets
            if self.norm is None and described:
                raise ValueError("a static input without a norm has neither columns nor offsets")
        else:
            _refuse_uneven("hadamard block", self.input.hadamard, self.in_features)
            _refuse_uneven("run of heads", self.input.heads_run, self.in_features)
        segments = self.weight.segments
        if segments is not None and sum(segments) != self.in_features:
            raise ValueError(
                f"segments {list(segments)} add up to {sum(segments)}, not to the "
                f"{self.in_features} columns"
            )

    @property
    def static(self) -> StaticInput | None:
        """The input if it is static, else None."""
        return self.input if isinstance(self.input, StaticInput) else None

    @property
    def dynamic(self) -> DynamicInput | None:
        """The input if it is dynamic, else None."""
        return self.input if isinstance(self.input, DynamicInput) else None

    @property
    def columns(self) -> int | None:
        """K where the input is gathered; None: the channels as they are."""
        return self.input.columns if isinstance(self.input, StaticInput) else None

    @property
    def in_features(self) -> int:
        """K: columns of the stored weight."""
        return self.columns or self.shape[1]

    @property
    def groups(self) -> int:
        """Weight steps of an output channel; the last group may be short."""
        spans = span_slices(self.in_features, self.weight.group_size, self.weight.segments)
        return 1 if spans is None else len(spans)

    def merge_key(self) -> tuple[object, ...]:
        """All that linears must share for a server to merge them into one."""
        return (self.shape[1], self.norm, self.weight, self.input, self.output_offset)


def _refuse_uneven(what: str, size: int | None, columns: int) -> None:
    if size is not None and columns % size:
        raise ValueError(f"{what} {size} must divide {columns} input channels")

"""Every choice of the quantizer, frozen, with unit, default and the paper's symbol."""

from collections.abc import Mapping
from typing import Annotated, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from mergequant_vllm.format.targets import check_pattern, matches

Rotation = Literal["none", "offline", "online"]  # decided

# Fields that may differ from linear to linear: what has no meaning but for static activations, for
# those per token, and the others.
STATIC_ONLY: Final = frozenset(
    {
        "alpha",
        "max_extra_channels",
        "reconstruction",
        "segments",
        "split_by",
        "staggered",
        "static_bits",
        "static_zero_points",
    }
)
DYNAMIC_ONLY: Final = frozenset({"dynamic_bits", "dynamic_zero_points"})
OVERRIDABLE: Final = (
    STATIC_ONLY
    | DYNAMIC_ONLY
    | {
        "activations",
        "asymmetric",
        "clipping",
        "group_size",
        "input_correction",
        "weight_bits",
        "weight_search",
        "weights",
    }
)


class Options(BaseModel):
    """Options of `quantize`; stored in the checkpoint.

    Attributes:
        activations: `static`: per-channel steps migrated into the norms, o and down per token (the
            paper's scheme); `fully_static`: o's and down's too, migrated into the rows of v and up,
            so that the KV cache holds v / s; `dynamic`: a step per token for every linear (the
            baseline).
        rotation: `none`; `offline`: the residual stream and the heads' values are rotated in the
            weights (R1, R2); `online`: also down's input, by the server (R4); `auto`: `online` or
            `none`, what measures best, see `choose_rotation`.
        residual_rotation: which channels R1 mixes: `full`, all with all; `graded`, like with like,
            in a few groups by their variance on calibration text, with static activations.
        equalization: o's and down's channels are brought to like size by v's and up's rows, which
            costs the server nothing, see `methods.equalize`.
        hadamard_block: largest block of R4; smaller ones let tensor parallelism cut finer shards.
        mix_heads: with rotation `online`, o's input is mixed across so many heads, by the server;
            0: not at all. It divides the number of heads, and a tensor-parallel rank holds whole
            multiples of it.
        static_bits: width of static activations' codes: those behind norms (with `activations`
            fully_static: of all that are static).
        dynamic_bits: width of those per token: o's and down's (with `activations` dynamic: all).
        static_zero_points: norm-fed activations have a zero point for each channel, which costs
            the server nothing: it is an offset before rounding, and a constant of the output.
        dynamic_zero_points: o's and down's tokens have zero points.
        reconstruction: `none`; `prune`: strong channels split, as many others dropped (paper 4.2);
            `pad`: split and nothing dropped, K grows up to `max_extra_channels`; `auto`: what
            measures best on calibration text, see `choose_reconstruction`.
        alpha: how many standard deviations above the mean make a channel strong (paper Eq. 6); the
            paper's for the `architecture`; or `auto`, what measures best.
        split_by: what Eq. 6 measures: the activation `step` (the paper), or the size of the
            `folded` weight column, step times the column's norm.
        staggered: copies of a channel round at different offsets, so that their sum resolves finer.
        max_extra_channels: bound on the growth of K under `pad`, as a fraction of the channels.
        weights: how codes are chosen: `gptq` (paper 5) or `rtn`, round to nearest.
        input_correction: with `gptq`, a weight is first fitted to give from its rounded input what
            it gave from the exact one, as far as tokens that were held out agree.
        weight_bits: width of a weight code.
        group_size: input channels that share a weight step; None: one step per output channel, or,
            of down with `activations` fully_static, groups of 64, unless an override says null.
        segments: weight steps along K of the norm-fed linears: their columns are sorted by size
            and cut into so many runs, each with a step of its own; None: one step.
        asymmetric: weights have zero points.
        weight_search: weight steps by `minmax` (the paper) or by least squared error, `mse`.
        head_bits: width of the head's weight codes: 8, with a step per token for its 8-bit input;
            16: the head stays as it is, as rerankers need it that read their classes from it. A
            head tied to the embedding becomes a tensor of its own.
        clipping: `none`; `channel` clips the norm-fed linears; `adaptive` also o and down
            (paper 4.2, Eq. 7; Table 7's rows).
        compensation: what is trained: `elementwise`, every weight by itself; `low_rank`, matrices
            that are merged (paper 4.3).
        compensation_rank: r of the low-rank matrices that are trained and merged (paper 4.3); 0:
            nothing is trained, whatever `compensation` says.
        compensation_epochs: most passes over the compensation's windows (paper B: 15).
        compensation_samples: windows of text to train on, some of them held out (paper B: 256).
        compensation_learning_rate: of AdamW, in weight steps; decays linearly to 0.
        statistics_samples: windows of text for steps and clip ratios (paper B: 32).
        gptq_samples: windows of text for Hessians (paper B: 256); None: as many as make 21 tokens
            for each channel of the widest input, with which the error on other text is a tenth
            above that on this one; half of them where nothing is trained. See `Samples`.
        sequence_length: tokens in a window (paper B: 2048).
        damping: added to the Hessian's diagonal, as a fraction of its mean.
        gptq_block: columns that GPTQ updates at once.
        lowest_clip: smallest clip ratio tried.
        clip_points: clip ratios tried, evenly spaced from `lowest_clip` to 1.
        average_bits: mean width of weights and inputs over all multiplications that may be spent:
            the most sensitive linears get 8-bit inputs, then 8-bit weights, see `choose_bits`;
            None: no linear is given more than it is by the other options.
        within: the same until the loss that rounding is estimated to add, in nats a token, is not
            more than this.
        ignore: patterns on full module names: linears that stay in 16 bits.
        overrides: by pattern, the fields that differ for the linears whose full names it matches;
            of several that match, the later one counts. A pattern is a module's name, or `re:` and
            a regular expression that must match from the name's beginning. Linears that vLLM
            merges (q, k, v; gate, up) must be alike.
        seed: picks the calibration windows.
        device: torch device that calibrates, such as `cpu` or `cuda`; `auto` prefers CUDA.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    activations: Literal["static", "dynamic", "fully_static"] = "static"
    rotation: Literal["none", "offline", "online", "auto"] = "auto"
    residual_rotation: Literal["full", "graded"] = "graded"
    equalization: bool = True
    hadamard_block: int = Field(default=128, ge=2)
    mix_heads: int = Field(default=0, ge=0)
    static_bits: Literal[4, 6, 8] = 4
    dynamic_bits: Literal[4, 6, 8] = 4
    static_zero_points: bool = True
    dynamic_zero_points: bool = False
    reconstruction: Literal["none", "prune", "pad", "auto"] = "auto"
    alpha: Annotated[float, Field(ge=0)] | Literal["architecture", "auto"] = "auto"
    split_by: Literal["step", "folded"] = "folded"
    staggered: bool = True
    max_extra_channels: float = Field(default=0.125, gt=0)
    weights: Literal["gptq", "rtn"] = "gptq"
    input_correction: bool = True
    weight_bits: Literal[3, 4, 6, 8] = 4
    group_size: int | None = Field(default=None, ge=32, multiple_of=32)
    segments: int | None = Field(default=None, ge=2)
    asymmetric: bool = False
    weight_search: Literal["minmax", "mse"] = "mse"
    head_bits: Literal[8, 16] = 8
    clipping: Literal["none", "channel", "adaptive"] = "adaptive"
    compensation: Literal["low_rank", "elementwise"] = "elementwise"
    compensation_rank: int = Field(default=64, ge=0)
    compensation_epochs: int = Field(default=4, ge=1)
    compensation_samples: int = Field(default=64, ge=2)
    compensation_learning_rate: float = Field(default=0.01, gt=0)
    statistics_samples: int = Field(default=32, ge=1)
    gptq_samples: int | None = Field(default=None, ge=1)
    sequence_length: int = Field(default=512, ge=16)
    damping: float = Field(default=0.01, gt=0)
    gptq_block: int = Field(default=128, ge=1)
    lowest_clip: float = Field(default=0.4, gt=0, le=1)
    clip_points: int = Field(default=13, ge=2)
    average_bits: float | None = Field(default=None, ge=3, le=8)
    within: float | None = Field(default=None, gt=0)
    ignore: tuple[str, ...] = ()
    overrides: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    seed: int = 0
    device: str = "auto"

    @model_validator(mode="after")
    def _steps_along_k_are_of_one_kind(self) -> Self:
        if self.segments is not None and self.group_size is not None:
            raise ValueError("a weight has groups or segments, not both: give one of them")
        return self

    @model_validator(mode="after")
    def _heads_are_mixed_online(self) -> Self:
        if self.mix_heads and self.rotation not in ("online", "auto"):
            raise ValueError("mix_heads is done by the server: give --rotation online")
        return self

    @model_validator(mode="after")
    def _carried_steps_are_chosen_once(self) -> Self:
        if self.activations != "fully_static":
            if any(x.get("activations") == "fully_static" for x in self.overrides.values()):
                raise ValueError(
                    "only the whole model can be fully static, since v and up carry the steps: "
                    "give --activations fully_static, and --override activations=static@PATTERN "
                    "for linears that are to have a step per token"
                )
            return self
        if self.mix_heads:
            raise ValueError("fully static activations leave no heads to mix: drop --mix-heads")
        if self.rotation == "online":
            raise ValueError(
                "fully static activations leave the server nothing to rotate: give --rotation "
                "offline, auto or none"
            )
        if self.average_bits is not None or self.within is not None:
            raise ValueError(
                "fully static activations take their widths from --static-bits alone: leave "
                "--average-bits, --within and --best out"
            )
        return self

    @model_validator(mode="after")
    def _patterns_and_overrides_are_known(self) -> Self:
        for pattern in (*self.ignore, *self.overrides):
            check_pattern(pattern)
        for pattern, fields in self.overrides.items():
            unknown = sorted(fields.keys() - OVERRIDABLE)
            if unknown:
                known = ", ".join(sorted(OVERRIDABLE))
                raise ValueError(f"{unknown[0]!r} cannot differ between layers; these can: {known}")
            _overridden(self, fields, pattern)
        return self

    def for_linear(self, name: str) -> "Options":
        """The options of one linear: these, with what `overrides` say of its full name."""
        options = self
        for pattern, fields in self.overrides.items():
            if matches(pattern, name):
                options = _overridden(options, fields, pattern)
        return options

    def overrides_field(self, field: str, name: str) -> bool:
        """Whether `overrides` say anything of `field`, null too, for the linear of this name."""
        return any(field in y for x, y in self.overrides.items() if matches(x, name))

    def ignores(self, name: str) -> bool:
        """Whether the linear of this full name stays in 16 bits."""
        return any(matches(pattern, name) for pattern in self.ignore)

    def plain(self) -> "Options":
        """These without reconstruction and training: what pilots try that decide on neither."""
        return self.model_copy(
            update={"reconstruction": "none", "alpha": 0.0, "compensation_rank": 0}
        )

    @property
    def decided_rotation(self) -> Rotation:
        """`rotation` of options in which it is decided."""
        assert self.rotation != "auto"
        return self.rotation

    @property
    def compensated(self) -> bool:
        """Whether blocks are trained."""
        return self.compensation_rank > 0


def _overridden(options: Options, fields: Mapping[str, JsonValue], pattern: str) -> Options:
    """`options` but for `fields`; raises ValueError that names the pattern."""
    values = options.model_dump(exclude={"ignore", "overrides"})
    try:
        return Options.model_validate({**values, **fields})
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise ValueError(f"for {pattern!r}, {where}: {fault['msg']}") from error

"""Every choice of the quantizer, frozen, with unit, default and the paper's symbol."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Options(BaseModel):
    """Options of `quantize`; stored in the checkpoint.

    Attributes:
        activations: `static`: per-channel steps migrated into the norms, o and down per token (the
            paper's scheme); `dynamic`: a step per token for every linear (the baseline).
        activation_step: of the norm-fed linears: one a `channel` (the paper); one for the whole
            `tensor`; one for the tensor after its channels were evened out as SmoothQuant does,
            `smooth`. The last two are the static baselines of the paper's tables.
        mix_activations: o's and down's step: one a `token`, or one static step for the `tensor`,
            a baseline that no checkpoint holds.
        rotation: `none`; `offline`: the residual stream and the heads' values are rotated in the
            weights (R1, R2); `online`: also down's input, by the server (R4).
        hadamard_block: largest block of R4; smaller ones let tensor parallelism cut finer shards.
        static_bits: width of the norm-fed linears' activation codes.
        dynamic_bits: width of o's and down's (with `activations` dynamic: of all).
        reconstruction: `none`; `prune`: strong channels split, as many others dropped (paper 4.2);
            `pad`: split and nothing dropped, K grows up to `max_extra_channels`; `auto`: what
            measures best on calibration text, see `pilot`.
        alpha: how many standard deviations above the mean make a channel strong (paper Eq. 6); the
            paper's for the `architecture`; or `auto`, what measures best.
        split_by: what Eq. 6 measures: the activation `step` (the paper), or the size of the
            `folded` weight column, step times the column's norm.
        staggered: copies of a channel round at different offsets, so that their sum resolves finer.
        max_extra_channels: bound on the growth of K under `pad`, as a fraction of the channels.
        weights: how codes are chosen: `gptq` (paper 5) or `rtn`, round to nearest; `none` leaves
            them as they are (the paper's Table 7), which no checkpoint holds.
        weight_bits: width of a weight code.
        group_size: input channels that share a weight step; None: one step per output channel.
        asymmetric: weights have zero points.
        weight_search: weight steps by `minmax` (the paper) or by least squared error, `mse`.
        head_bits: width of the head's weight codes: 8, with a step per token for its 8-bit input;
            16: the head stays as it is. A head tied to the embedding becomes a tensor of its own.
        clipping: `none`; `channel` clips the norm-fed linears; `adaptive` also o and down
            (paper 4.2, Eq. 7; Table 7's rows).
        compensation_rank: r of the low-rank matrices that are trained and merged (paper 4.3); 0:
            none.
        compensation_epochs: most passes over the compensation's windows (paper B: 15).
        compensation_samples: windows of text to train on, some of them held out (paper B: 256).
        compensation_learning_rate: of AdamW, in weight steps; decays linearly to 0.
        statistics_samples: windows of text for steps and clip ratios (paper B: 32).
        gptq_samples: windows of text for Hessians (paper B: 256).
        sequence_length: tokens in a window (paper B: 2048).
        damping: added to the Hessian's diagonal, as a fraction of its mean.
        gptq_block: columns that GPTQ updates at once.
        lowest_clip: smallest clip ratio tried.
        clip_points: clip ratios tried, evenly spaced from `lowest_clip` to 1.
        seed: picks the calibration windows.
        device: torch device that calibrates, such as `cpu` or `cuda`; `auto` prefers CUDA.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    activations: Literal["static", "dynamic"] = "static"
    activation_step: Literal["channel", "tensor", "smooth"] = "channel"
    mix_activations: Literal["token", "tensor"] = "token"
    rotation: Literal["none", "offline", "online"] = "none"
    hadamard_block: int = Field(default=128, ge=2)
    static_bits: Literal[4, 8] = 4
    dynamic_bits: Literal[4, 8] = 4
    reconstruction: Literal["none", "prune", "pad", "auto"] = "auto"
    alpha: Annotated[float, Field(ge=0)] | Literal["architecture", "auto"] = "auto"
    split_by: Literal["step", "folded"] = "folded"
    staggered: bool = True
    max_extra_channels: float = Field(default=0.125, gt=0)
    weights: Literal["gptq", "rtn", "none"] = "gptq"
    weight_bits: Literal[3, 4, 8] = 4
    group_size: int | None = Field(default=None, ge=32, multiple_of=32)
    asymmetric: bool = False
    weight_search: Literal["minmax", "mse"] = "mse"
    head_bits: Literal[8, 16] = 16
    clipping: Literal["none", "channel", "adaptive"] = "adaptive"
    compensation_rank: int = Field(default=64, ge=0)
    compensation_epochs: int = Field(default=8, ge=1)
    compensation_samples: int = Field(default=256, ge=2)
    compensation_learning_rate: float = Field(default=0.01, gt=0)
    statistics_samples: int = Field(default=32, ge=1)
    gptq_samples: int = Field(default=256, ge=1)
    sequence_length: int = Field(default=2048, ge=16)
    damping: float = Field(default=0.01, gt=0)
    gptq_block: int = Field(default=128, ge=1)
    lowest_clip: float = Field(default=0.4, gt=0, le=1)
    clip_points: int = Field(default=13, ge=2)
    seed: int = 0
    device: str = "auto"

    @model_validator(mode="after")
    def _baselines_are_plain(self) -> Self:
        plain = self.clipping == "none" and self.reconstruction == "none"
        if self.activation_step != "channel" and not plain:
            raise ValueError(
                f"activation_step {self.activation_step!r} has no channels to clip or reconstruct: "
                "give --clipping none --reconstruction none"
            )
        return self

    @property
    def compensated(self) -> bool:
        """Whether blocks are trained."""
        return self.compensation_rank > 0 and self.weights != "none"

    @property
    def exported(self) -> bool:
        """Whether a checkpoint can hold the result; else it runs in the reference engine alone."""
        return self.weights != "none" and self.mix_activations == "token"

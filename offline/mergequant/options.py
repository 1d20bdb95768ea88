"""Every choice of the quantizer, frozen, with unit, default and the paper's symbol."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """Options of `quantize`; stored in the checkpoint.

    Attributes:
        activations: `static`: per-channel steps migrated into the norms, o and down per token (the
            paper's scheme); `dynamic`: a step per token for every linear (the baseline).
        weights: how codes are chosen: `gptq` (paper 5) or `rtn`, round to nearest.
        clipping: `none`; `channel` clips the norm-fed linears; `adaptive` also o and down
            (paper 4.2, Eq. 7; Table 7's rows).
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
    weights: Literal["gptq", "rtn"] = "gptq"
    clipping: Literal["none", "channel", "adaptive"] = "adaptive"
    statistics_samples: int = Field(default=32, ge=1)
    gptq_samples: int = Field(default=256, ge=1)
    sequence_length: int = Field(default=2048, ge=16)
    damping: float = Field(default=0.01, gt=0)
    gptq_block: int = Field(default=128, ge=1)
    lowest_clip: float = Field(default=0.4, gt=0, le=1)
    clip_points: int = Field(default=13, ge=2)
    seed: int = 0
    device: str = "auto"

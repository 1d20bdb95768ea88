"""Granite: Llama's block between constant factors, which the configuration gives."""

from dataclasses import replace

from mergequant.model.architecture import Scales
from mergequant.model.architectures.llama import LLAMA

GRANITE = replace(
    LLAMA,
    model_type="granite",
    scales=Scales(
        residual="residual_multiplier",
        logits="logits_scaling",
    ),
)

"""Granite: Llama's block between constant factors, which the configuration gives."""

from dataclasses import replace

from mergequant.model.architecture import Scales
from mergequant.model.architectures.llama import LLAMA, UNKNOWN

GRANITE = replace(
    LLAMA,
    model_type="granite",
    # vLLM's class serves models that have sinks, and positions of their own in each block, too.
    served_with={
        "hidden_act": "silu",
        **UNKNOWN,
        "layer_types": None,
        "attention_sinks": False,
        "layer_rope_theta": None,
    },
    scales=Scales(
        residual="residual_multiplier",
        logits="logits_scaling",
    ),
)

"""Ernie 4.5 (dense): Llama's block with interleaved rotary positions, without biases."""

from dataclasses import replace

from mergequant.model.architectures.llama import NO_BIASES
from mergequant.model.architectures.mistral import MISTRAL

ERNIE4_5 = replace(
    MISTRAL,
    model_type="ernie4_5",
    # vLLM serves it by Llama's class, which looks for biases under other names.
    served_with={**NO_BIASES, "use_bias": False},
    windows="none",
)

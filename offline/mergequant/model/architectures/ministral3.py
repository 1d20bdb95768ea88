"""Ministral 3's text model: Mistral's block, whose queries grow with the position."""

from dataclasses import replace

from mergequant.model.architectures.mistral import MISTRAL

_POSITIONS = "rope_parameters"

MINISTRAL3 = replace(
    MISTRAL,
    model_type="ministral3",
    restated={
        "llama_4_scaling": {
            "original_max_position_embeddings": f"{_POSITIONS}.original_max_position_embeddings",
            "beta": f"{_POSITIONS}.llama_4_scaling_beta",
        }
    },
)

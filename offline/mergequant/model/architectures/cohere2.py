"""Cohere 2 (Command R7B): Cohere's block; blocks without a window have no positions."""

from dataclasses import replace

from mergequant.model.architectures.cohere import COHERE

COHERE2 = replace(
    COHERE,
    model_type="cohere2",
    windows="some",
    wider_windows=True,
)

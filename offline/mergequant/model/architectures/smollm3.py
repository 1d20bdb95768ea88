"""SmolLM3: Llama's block; some blocks have no positions."""

from dataclasses import replace

from mergequant.model.architectures.llama import LLAMA

SMOLLM3 = replace(LLAMA, model_type="smollm3", windows="some", partly_rotary=True)

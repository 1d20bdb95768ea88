"""One table a model type. `find` is the only way in; an unknown type is an error, never a guess."""

from mergequant.errors import InputError
from mergequant.model.architecture import Architecture
from mergequant.model.architectures.bloom import BLOOM
from mergequant.model.architectures.cohere import COHERE
from mergequant.model.architectures.cohere2 import COHERE2
from mergequant.model.architectures.ernie4_5 import ERNIE4_5
from mergequant.model.architectures.exaone4 import EXAONE4
from mergequant.model.architectures.gemma2 import GEMMA2
from mergequant.model.architectures.gemma3_text import GEMMA3_TEXT
from mergequant.model.architectures.glm4 import GLM4
from mergequant.model.architectures.gpt_neox import GPT_NEOX
from mergequant.model.architectures.granite import GRANITE
from mergequant.model.architectures.llama import LLAMA
from mergequant.model.architectures.ministral3 import MINISTRAL3
from mergequant.model.architectures.mistral import MISTRAL
from mergequant.model.architectures.olmo2 import OLMO2
from mergequant.model.architectures.opt import OPT
from mergequant.model.architectures.phi import PHI
from mergequant.model.architectures.phi3 import PHI3
from mergequant.model.architectures.qwen2 import QWEN2
from mergequant.model.architectures.qwen3 import QWEN3
from mergequant.model.architectures.smollm3 import SMOLLM3
from mergequant.model.architectures.stablelm import STABLELM
from mergequant.model.architectures.starcoder2 import STARCODER2

_GATED = (LLAMA, MISTRAL, MINISTRAL3, QWEN2, QWEN3, GRANITE, ERNIE4_5, SMOLLM3, PHI3)
_POST_NORM = (GEMMA2, GEMMA3_TEXT, OLMO2, EXAONE4, GLM4)
_LAYER_NORM = (OPT, BLOOM, GPT_NEOX, STARCODER2, STABLELM, PHI, COHERE, COHERE2)

ARCHITECTURES = {table.model_type: table for table in (*_GATED, *_POST_NORM, *_LAYER_NORM)}


def find(model_type: str | None) -> Architecture:
    """The table of a `model_type`; raises InputError that names the known ones."""
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(
            f"Architecture {model_type!r} is unknown: mergequant knows {known}; give a model of "
            "one of these, whose config.json names it as model_type."
        )
    return ARCHITECTURES[model_type]

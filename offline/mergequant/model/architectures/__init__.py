"""One table a model type. `find` is the only way in; an unknown type is an error, never a guess."""

from mergequant.errors import InputError
from mergequant.model.architecture import Architecture
from mergequant.model.architectures.ernie4_5 import ERNIE4_5
from mergequant.model.architectures.granite import GRANITE
from mergequant.model.architectures.llama import LLAMA
from mergequant.model.architectures.mistral import MISTRAL
from mergequant.model.architectures.qwen2 import QWEN2
from mergequant.model.architectures.qwen3 import QWEN3

ARCHITECTURES = {
    table.model_type: table for table in (LLAMA, MISTRAL, QWEN2, QWEN3, GRANITE, ERNIE4_5)
}


def find(model_type: str | None) -> Architecture:
    """The table of a `model_type`; raises InputError that names the known ones."""
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(
            f"Architecture {model_type!r} is unknown: mergequant knows {known}; give a model of "
            "one of these, whose config.json names it as model_type."
        )
    return ARCHITECTURES[model_type]

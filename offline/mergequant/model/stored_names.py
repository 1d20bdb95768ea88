"""Tensors' names in a model's files, which may lack what whole models' names begin with.

In files of a model that was saved without its head, as BLOOM's are, `transformer.h.0` is `h.0`.
"""

from collections.abc import Collection, Mapping
from typing import Any

from mergequant.model.architectures import ARCHITECTURES


def stored_names(config: Mapping[str, Any], stored: Collection[str]) -> dict[str, str]:
    """By the name that tables and servers use, the name in the files; without leftovers.

    Args:
        config: the model's.
        stored: names in the files.
    """
    architecture = ARCHITECTURES.get(str(config.get("model_type")))
    if architecture is None:
        return {name: name for name in stored}
    base = f"{architecture.block.partition('.')[0]}."
    whole = any(name.startswith(base) for name in stored)
    head = f"{architecture.head.name}."
    return {
        name if whole or name.startswith(head) else f"{base}{name}": name
        for name in stored
        if not name.endswith(architecture.ignored_suffixes)
    }

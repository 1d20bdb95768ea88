"""MergeQuant: INT4 weights and static per-channel INT4 activations for vLLM.

`quantize` makes a checkpoint; `perplexity` measures one. The command line is `mergequant`.
Importing this package makes transformers know the checkpoint's format.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mergequant.transformers_hook import install

if TYPE_CHECKING:
    from mergequant.errors import InputError
    from mergequant.evaluate.perplexity import Perplexity, perplexity
    from mergequant.options import Options
    from mergequant.quantizer.run import quantize

__all__ = ["InputError", "Options", "Perplexity", "perplexity", "quantize"]

_HOMES = {
    "InputError": "errors",
    "Options": "options",
    "Perplexity": "evaluate.perplexity",
    "perplexity": "evaluate.perplexity",
    "quantize": "quantizer.run",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line answers before torch and transformers are loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mergequant' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mergequant.{_HOMES[name]}"), name)


install()

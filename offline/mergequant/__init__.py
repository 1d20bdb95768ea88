"""MergeQuant: INT4 weights and static per-channel INT4 activations for vLLM.

`quantize` makes a checkpoint; `perplexity` measures one. The command line is `mergequant`.
"""

from mergequant.errors import InputError
from mergequant.evaluate import Perplexity, perplexity
from mergequant.options import Options
from mergequant.pipeline import quantize

__all__ = ["InputError", "Options", "Perplexity", "perplexity", "quantize"]

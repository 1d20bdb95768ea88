"""EXAONE 4: OLMo 2's block with a norm on each query and key head; some blocks have a window."""

from dataclasses import replace

from mergequant.model.architecture import HeadNorm
from mergequant.model.architectures.llama import NO_BIASES
from mergequant.model.architectures.olmo2 import OLMO2

EXAONE4 = replace(
    OLMO2,
    model_type="exaone4",
    windows_by_size=True,
    head_norms=(HeadNorm("self_attn.q_norm"), HeadNorm("self_attn.k_norm")),
    windows="some",
    partly_rotary=False,
    served_with=NO_BIASES,
)

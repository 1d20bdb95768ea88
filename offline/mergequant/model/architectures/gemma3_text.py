"""Gemma 3, its language model: Gemma 2's block with a norm on each query and key head."""

from dataclasses import replace

from mergequant.model.architecture import HeadNorm
from mergequant.model.architectures.gemma2 import GEMMA2

GEMMA3_TEXT = replace(
    GEMMA2,
    model_type="gemma3_text",
    served_head="any",
    served_with={
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "is_causal": True,
    },
    head_norms=(HeadNorm("self_attn.q_norm"), HeadNorm("self_attn.k_norm")),
)

"""OLMo 2: norms behind attention and MLP, so their inputs are the residual, which none folds into.

Queries and keys have a norm over all heads together.
"""

from dataclasses import replace

from mergequant.model.architecture import HeadNorm, Linear, Norm
from mergequant.model.architectures.llama import LLAMA, POST_NORM_SPACES

OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    partly_rotary=True,
    spaces=POST_NORM_SPACES,
    norms=(
        Norm("post_attention_layernorm", "attn_out", "residual"),
        Norm("post_feedforward_layernorm", "mlp_out", "residual"),
    ),
    head_norms=(HeadNorm("self_attn.q_norm", "queries"), HeadNorm("self_attn.k_norm", "keys")),
    linears=(
        Linear("self_attn.q_proj", reads="attn_in", writes="query"),
        Linear("self_attn.k_proj", reads="attn_in", writes="key"),
        Linear("self_attn.v_proj", reads="attn_in", writes="value"),
        Linear("self_attn.o_proj", reads="attn_mix", writes="attn_out"),
        Linear("mlp.gate_proj", reads="mlp_in", writes="mlp_gate"),
        Linear("mlp.up_proj", reads="mlp_in", writes="mlp_up"),
        Linear("mlp.down_proj", reads="mlp_mid", writes="mlp_out"),
    ),
    served_with={"hidden_act": "silu", "attention_bias": False},
)

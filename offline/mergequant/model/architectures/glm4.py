"""GLM-4 (0414): norms before and behind attention and MLP; gate and up in one matrix."""

from mergequant.model.architecture import Architecture, Linear, Norm
from mergequant.model.architectures.llama import POST_NORM_SPACES

GLM4 = Architecture(
    model_type="glm4",
    spaces=POST_NORM_SPACES,
    norms=(
        Norm("input_layernorm", "residual", "attn_in"),
        Norm("post_self_attn_layernorm", "attn_out", "residual"),
        Norm("post_attention_layernorm", "residual", "mlp_in"),
        Norm("post_mlp_layernorm", "mlp_out", "residual"),
    ),
    linears=(
        Linear("self_attn.q_proj", reads="attn_in", writes="query", bias="attention_bias"),
        Linear("self_attn.k_proj", reads="attn_in", writes="key", bias="attention_bias"),
        Linear("self_attn.v_proj", reads="attn_in", writes="value", bias="attention_bias"),
        Linear("self_attn.o_proj", reads="attn_mix", writes="attn_out"),
        Linear("mlp.gate_up_proj", reads="mlp_in", writes=("mlp_gate", "mlp_up")),
        Linear("mlp.down_proj", reads="mlp_mid", writes="mlp_out"),
    ),
    windows="none",
    partly_rotary=True,
)

"""StableLM: Llama's block with LayerNorms that have biases, and biases of q, k and v if asked."""

from dataclasses import replace

from mergequant.model.architecture import Linear, Norm
from mergequant.model.architectures.layer_norm_block import LAYER_NORMS
from mergequant.model.architectures.llama import LLAMA

STABLELM = replace(
    LLAMA,
    model_type="stablelm",
    norms=LAYER_NORMS,
    linears=(
        Linear("self_attn.q_proj", reads="attn_in", writes="query", bias="use_qkv_bias"),
        Linear("self_attn.k_proj", reads="attn_in", writes="key", bias="use_qkv_bias"),
        Linear("self_attn.v_proj", reads="attn_in", writes="value", bias="use_qkv_bias"),
        Linear("self_attn.o_proj", reads="attn_mix", writes="residual"),
        Linear("mlp.gate_proj", reads="mlp_in", writes="mlp_gate"),
        Linear("mlp.up_proj", reads="mlp_in", writes="mlp_up"),
        Linear("mlp.down_proj", reads="mlp_mid", writes="residual"),
    ),
    final_norm=Norm("model.norm", "residual", "final_in", kind="layer", bias=True),
    served_with={
        "hidden_act": "silu",
        "use_parallel_residual": False,
        "qk_layernorm": False,
    },
    preferred={"norm_eps": "layer_norm_eps"},
    free_head_size=False,
    partly_rotary=True,
)

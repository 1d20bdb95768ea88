"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v."""

from mergequant.model.architecture import Architecture, Linear
from mergequant.model.architectures.llama import NORMS, SPACES

QWEN2 = Architecture(
    model_type="qwen2",
    served_with={
        "hidden_act": "silu",
        "dual_chunk_attention_config": None,
        "qk_norm": False,
        "is_causal": True,
    },
    free_head_size=False,
    spaces=SPACES,
    norms=NORMS,
    linears=(
        Linear("self_attn.q_proj", reads="attn_in", writes="query", bias=True),
        Linear("self_attn.k_proj", reads="attn_in", writes="key", bias=True),
        Linear("self_attn.v_proj", reads="attn_in", writes="value", bias=True),
        Linear("self_attn.o_proj", reads="attn_mix", writes="residual"),
        Linear("mlp.gate_proj", reads="mlp_in", writes="mlp_gate"),
        Linear("mlp.up_proj", reads="mlp_in", writes="mlp_up"),
        Linear("mlp.down_proj", reads="mlp_mid", writes="residual"),
    ),
)

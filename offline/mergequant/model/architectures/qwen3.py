"""Qwen3 (dense): Llama's block with a norm on each query and key head."""

from mergequant.model.architecture import Architecture, HeadNorm, Linear
from mergequant.model.architectures.llama import NORMS, SPACES

QWEN3 = Architecture(
    model_type="qwen3",
    spaces=SPACES,
    norms=NORMS,
    # vLLM has biases for q, k and v there, and none for o.
    served_with={
        "hidden_act": "silu",
        "attention_bias": False,
        "dual_chunk_attention_config": None,
        "is_causal": True,
    },
    head_norms=(HeadNorm("self_attn.q_norm"), HeadNorm("self_attn.k_norm")),
    linears=(
        Linear("self_attn.q_proj", reads="attn_in", writes="query"),
        Linear("self_attn.k_proj", reads="attn_in", writes="key"),
        Linear("self_attn.v_proj", reads="attn_in", writes="value"),
        Linear("self_attn.o_proj", reads="attn_mix", writes="residual"),
        Linear("mlp.gate_proj", reads="mlp_in", writes="mlp_gate"),
        Linear("mlp.up_proj", reads="mlp_in", writes="mlp_up"),
        Linear("mlp.down_proj", reads="mlp_mid", writes="residual"),
    ),
)

"""Llama: RMSNorm -> attention -> RMSNorm -> gated MLP; optional biases."""

from collections.abc import Mapping

from mergequant.model.architecture import Architecture, Linear, Norm, Space

SPACES = (
    Space("tokens", "vocabulary"),
    Space("residual", "hidden"),
    Space("attn_in", "hidden"),
    Space("query", "queries"),
    Space("key", "keys"),
    Space("value", "keys"),
    Space("attn_mix", "queries"),  # each head's mixture of its group's `value`
    Space("mlp_in", "hidden"),
    Space("mlp_gate", "intermediate"),
    Space("mlp_up", "intermediate"),
    Space("mlp_mid", "intermediate"),  # act(mlp_gate) * mlp_up
    Space("final_in", "hidden"),
)

# What attention and the MLP write goes through a norm before the residual takes it.
POST_NORM_SPACES = (*SPACES, Space("attn_out", "hidden"), Space("mlp_out", "hidden"))

NORMS = (
    Norm("input_layernorm", reads="residual", writes="attn_in"),
    Norm("post_attention_layernorm", reads="residual", writes="mlp_in"),
)

# What vLLM's class of Llama looks for, also where it serves other model types, and transformers'
# classes do not.
UNKNOWN: Mapping[str, object] = {
    "bias": False,
    "logit_scale": 1.0,
    "is_causal": True,
}
PREFERRED: Mapping[str, str] = {"qkv_bias": "attention_bias"}
NO_BIASES: Mapping[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    **UNKNOWN,
}

LLAMA = Architecture(
    model_type="llama",
    windows="none",
    served_with={"hidden_act": "silu", **UNKNOWN},
    preferred=PREFERRED,
    spaces=SPACES,
    norms=NORMS,
    linears=(
        Linear("self_attn.q_proj", reads="attn_in", writes="query", bias="attention_bias"),
        Linear("self_attn.k_proj", reads="attn_in", writes="key", bias="attention_bias"),
        Linear("self_attn.v_proj", reads="attn_in", writes="value", bias="attention_bias"),
        Linear("self_attn.o_proj", reads="attn_mix", writes="residual", bias="attention_bias"),
        Linear("mlp.gate_proj", reads="mlp_in", writes="mlp_gate", bias="mlp_bias"),
        Linear("mlp.up_proj", reads="mlp_in", writes="mlp_up", bias="mlp_bias"),
        Linear("mlp.down_proj", reads="mlp_mid", writes="residual", bias="mlp_bias"),
    ),
)

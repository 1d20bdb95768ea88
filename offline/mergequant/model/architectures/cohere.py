"""Cohere (Command R): one LayerNorm without bias feeds attention and a gated MLP in parallel."""

from mergequant.model.architecture import Architecture, Linear, Norm, Scales
from mergequant.model.architectures.llama import SPACES

COHERE = Architecture(
    model_type="cohere",
    windows="none",
    spaces=tuple(space for space in SPACES if space.name != "mlp_in"),
    norms=(Norm("input_layernorm", "residual", "attn_in", kind="layer"),),
    linears=(
        Linear("self_attn.q_proj", reads="attn_in", writes="query"),
        Linear("self_attn.k_proj", reads="attn_in", writes="key"),
        Linear("self_attn.v_proj", reads="attn_in", writes="value"),
        Linear("mlp.gate_proj", reads="attn_in", writes="mlp_gate"),
        Linear("mlp.up_proj", reads="attn_in", writes="mlp_up"),
        Linear("self_attn.o_proj", reads="attn_mix", writes="residual"),
        Linear("mlp.down_proj", reads="mlp_mid", writes="residual"),
    ),
    final_norm=Norm("model.norm", "residual", "final_in", kind="layer"),
    served_head="tied",
    resumes=False,
    served_with={
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": None,  # with one vLLM has RMSNorm
        "use_qk_norm": False,
        "tie_word_embeddings": True,
    },
    scales=Scales(logits_times="logit_scale"),
)

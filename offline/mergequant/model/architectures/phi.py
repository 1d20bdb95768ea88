"""Phi (1, 1.5, 2): one LayerNorm feeds attention and a plain MLP; all with biases, the head too."""

from mergequant.model.architecture import Architecture, Linear, Norm
from mergequant.model.architectures.layer_norm_block import PLAIN_SPACES

PHI = Architecture(
    model_type="phi",
    partly_rotary=True,
    windows="none",
    spaces=tuple(space for space in PLAIN_SPACES if space.name != "mlp_in"),
    norms=(Norm("input_layernorm", "residual", "attn_in", kind="layer", bias=True),),
    linears=(
        Linear("self_attn.q_proj", reads="attn_in", writes="query", bias=True),
        Linear("self_attn.k_proj", reads="attn_in", writes="key", bias=True),
        Linear("self_attn.v_proj", reads="attn_in", writes="value", bias=True),
        Linear("mlp.fc1", reads="attn_in", writes="mlp_pre", bias=True),
        Linear("self_attn.dense", reads="attn_mix", writes="residual", bias=True),
        Linear("mlp.fc2", reads="mlp_mid", writes="residual", bias=True),
    ),
    final_norm=Norm("model.final_layernorm", "residual", "final_in", kind="layer", bias=True),
    head=Linear("lm_head", reads="final_in", writes="tokens", bias=True),
    resumes=False,
    served_with={"qk_layernorm": False},
)

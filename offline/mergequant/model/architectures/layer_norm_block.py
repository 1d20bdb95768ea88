"""Parts that models with LayerNorm and a plain MLP (fc1 -> act -> fc2) share."""

from mergequant.model.architecture import Norm, Space
from mergequant.model.architectures.llama import SPACES

PLAIN_SPACES = (
    *(space for space in SPACES if space.name not in ("mlp_gate", "mlp_up")),
    Space("mlp_pre", "intermediate"),  # `mlp_mid` is act(mlp_pre)
)
LAYER_NORMS = (
    Norm("input_layernorm", "residual", "attn_in", kind="layer", bias=True),
    Norm("post_attention_layernorm", "residual", "mlp_in", kind="layer", bias=True),
)
QKV = ("query", "key", "value")

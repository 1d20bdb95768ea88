"""StarCoder2: LayerNorms and a plain MLP with biases, rotary positions."""

from mergequant.model.architecture import Architecture, Linear, Norm
from mergequant.model.architectures.layer_norm_block import LAYER_NORMS, PLAIN_SPACES

_BIAS = "use_bias"

STARCODER2 = Architecture(
    model_type="starcoder2",
    partly_rotary=True,
    windows_by_size=True,
    spaces=PLAIN_SPACES,
    norms=LAYER_NORMS,
    linears=(
        Linear("self_attn.q_proj", reads="attn_in", writes="query", bias=_BIAS),
        Linear("self_attn.k_proj", reads="attn_in", writes="key", bias=_BIAS),
        Linear("self_attn.v_proj", reads="attn_in", writes="value", bias=_BIAS),
        Linear("self_attn.o_proj", reads="attn_mix", writes="residual", bias=_BIAS),
        Linear("mlp.c_fc", reads="mlp_in", writes="mlp_pre", bias=_BIAS),
        Linear("mlp.c_proj", reads="mlp_mid", writes="residual", bias=_BIAS),
    ),
    final_norm=Norm("model.norm", "residual", "final_in", kind="layer", bias=True),
    served_with={},
)

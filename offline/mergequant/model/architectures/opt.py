"""OPT: LayerNorm -> attention -> LayerNorm -> plain MLP, all with biases; learned positions."""

from mergequant.model.architecture import Architecture, Linear, Norm, Outer
from mergequant.model.architectures.layer_norm_block import PLAIN_SPACES
from mergequant_vllm.format import BLOCK

_BIAS = "enable_bias"

OPT = Architecture(
    model_type="opt",
    partly_rotary=True,
    free_head_size=False,
    windows="none",
    spaces=PLAIN_SPACES,
    block=f"model.decoder.layers.{BLOCK}",
    embedding=Linear("model.decoder.embed_tokens", reads="tokens", writes="residual"),
    outer=(Outer("model.decoder.embed_positions.weight", ("positions", "hidden"), more_rows=2),),
    norms=(
        Norm("self_attn_layer_norm", "residual", "attn_in", kind="layer", bias=True),
        Norm("final_layer_norm", "residual", "mlp_in", kind="layer", bias=True),
    ),
    linears=(
        Linear("self_attn.q_proj", reads="attn_in", writes="query", bias=_BIAS),
        Linear("self_attn.k_proj", reads="attn_in", writes="key", bias=_BIAS),
        Linear("self_attn.v_proj", reads="attn_in", writes="value", bias=_BIAS),
        Linear("self_attn.out_proj", reads="attn_mix", writes="residual", bias=_BIAS),
        Linear("fc1", reads="mlp_in", writes="mlp_pre", bias=_BIAS),
        Linear("fc2", reads="mlp_mid", writes="residual", bias=_BIAS),
    ),
    final_norm=Norm(
        "model.decoder.final_layer_norm", "residual", "final_in", kind="layer", bias=True
    ),
    intermediate="ffn_dim",
    served_head="16_bit",
    # OPT-350M has its norms behind the linears, and an embedding narrower than its blocks.
    served_with={
        "do_layer_norm_before": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
    },
)

"""GPT-NeoX, Pythia: two LayerNorms read one residual; q, k and v are one matrix, head by head."""

from mergequant.model.architecture import Architecture, Linear, Norm
from mergequant.model.architectures.layer_norm_block import LAYER_NORMS, PLAIN_SPACES, QKV
from mergequant_vllm.format import BLOCK

GPT_NEOX = Architecture(
    model_type="gpt_neox",
    partly_rotary=True,
    free_head_size=False,
    windows="none",
    spaces=PLAIN_SPACES,
    block=f"gpt_neox.layers.{BLOCK}",
    embedding=Linear("gpt_neox.embed_in", reads="tokens", writes="residual"),
    norms=LAYER_NORMS,
    linears=(
        Linear("attention.query_key_value", "attn_in", QKV, bias="attention_bias", per_head=True),
        Linear("attention.dense", "attn_mix", "residual", bias="attention_bias"),
        Linear("mlp.dense_h_to_4h", "mlp_in", "mlp_pre", bias=True),
        Linear("mlp.dense_4h_to_h", "mlp_mid", "residual", bias=True),
    ),
    final_norm=Norm("gpt_neox.final_layer_norm", "residual", "final_in", kind="layer", bias=True),
    head=Linear("embed_out", reads="final_in", writes="tokens"),
    head_in_transformers="lm_head",
    resumes=False,
    ignored_suffixes=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
    served_with={},
)

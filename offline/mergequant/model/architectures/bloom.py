"""BLOOM: a norm behind the embedding, ALiBi positions; q, k and v are one matrix, head by head."""

from mergequant.model.architecture import Architecture, Linear, Norm, Outer
from mergequant.model.architectures.layer_norm_block import LAYER_NORMS, PLAIN_SPACES, QKV
from mergequant_vllm.format import BLOCK

_BEHIND_EMBEDDING = "transformer.word_embeddings_layernorm"

BLOOM = Architecture(
    model_type="bloom",
    partly_rotary=True,
    free_head_size=False,
    windows="none",
    spaces=PLAIN_SPACES,
    block=f"transformer.h.{BLOCK}",
    embedding=Linear("transformer.word_embeddings", reads="tokens", writes="residual"),
    outer=(
        Outer(f"{_BEHIND_EMBEDDING}.weight", ("hidden",)),
        Outer(f"{_BEHIND_EMBEDDING}.bias", ("hidden",)),
    ),
    norms=LAYER_NORMS,
    linears=(
        Linear("self_attention.query_key_value", "attn_in", QKV, bias=True, per_head=True),
        Linear("self_attention.dense", "attn_mix", "residual", bias=True),
        Linear("mlp.dense_h_to_4h", "mlp_in", "mlp_pre", bias=True),
        Linear("mlp.dense_4h_to_h", "mlp_mid", "residual", bias=True),
    ),
    final_norm=Norm("transformer.ln_f", "residual", "final_in", kind="layer", bias=True),
    intermediate=4,
    served_head="tied",
    bare_inputs=True,
    eager=True,
    resumes=False,  # attention's module adds the residual itself
    served_with={
        "apply_residual_connection_post_layernorm": False,
        "tie_word_embeddings": True,
    },
)

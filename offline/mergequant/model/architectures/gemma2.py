"""Gemma 2: norms by 1 + w before and behind attention and MLP, a cap on the logits."""

from mergequant.model.architecture import Architecture, Linear, Norm, Scales
from mergequant.model.architectures.llama import POST_NORM_SPACES

GEMMA2 = Architecture(
    model_type="gemma2",
    spaces=POST_NORM_SPACES,
    norms=(
        Norm("input_layernorm", "residual", "attn_in", "one_plus"),
        Norm("post_attention_layernorm", "attn_out", "residual", "one_plus"),
        Norm("pre_feedforward_layernorm", "residual", "mlp_in", "one_plus"),
        Norm("post_feedforward_layernorm", "mlp_out", "residual", "one_plus"),
    ),
    linears=(
        Linear("self_attn.q_proj", reads="attn_in", writes="query", bias="attention_bias"),
        Linear("self_attn.k_proj", reads="attn_in", writes="key", bias="attention_bias"),
        Linear("self_attn.v_proj", reads="attn_in", writes="value", bias="attention_bias"),
        Linear("self_attn.o_proj", reads="attn_mix", writes="attn_out", bias="attention_bias"),
        Linear("mlp.gate_proj", reads="mlp_in", writes="mlp_gate"),
        Linear("mlp.up_proj", reads="mlp_in", writes="mlp_up"),
        Linear("mlp.down_proj", reads="mlp_mid", writes="mlp_out"),
    ),
    final_norm=Norm("model.norm", "residual", "final_in", "one_plus"),
    served_head="tied",
    windows="some",
    served_with={
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "use_bidirectional_attention": False,
    },
    scales=Scales(logits_cap="final_logit_softcapping"),
)

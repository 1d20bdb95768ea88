"""Mistral: Llama's block without biases."""

from mergequant.model.architecture import Architecture, Linear
from mergequant.model.architectures.llama import NO_BIASES, NORMS, PREFERRED, SPACES

MISTRAL = Architecture(
    model_type="mistral",
    windows_by_size=True,
    served_with=NO_BIASES,
    preferred=PREFERRED,
    spaces=SPACES,
    norms=NORMS,
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

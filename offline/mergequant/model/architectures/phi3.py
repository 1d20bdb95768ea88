"""Phi-3, Phi-4: Llama's block with q, k and v in one matrix, gate and up in another."""

from mergequant.model.architecture import Architecture, Linear
from mergequant.model.architectures.layer_norm_block import QKV
from mergequant.model.architectures.llama import NO_BIASES, NORMS, PREFERRED, SPACES

PHI3 = Architecture(
    model_type="phi3",
    partly_rotary=True,
    windows_by_size=True,
    served_with=NO_BIASES,
    preferred=PREFERRED,
    spaces=SPACES,
    norms=NORMS,
    linears=(
        Linear("self_attn.qkv_proj", reads="attn_in", writes=QKV),
        Linear("self_attn.o_proj", reads="attn_mix", writes="residual"),
        Linear("mlp.gate_up_proj", reads="mlp_in", writes=("mlp_gate", "mlp_up")),
        Linear("mlp.down_proj", reads="mlp_mid", writes="residual"),
    ),
)

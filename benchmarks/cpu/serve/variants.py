"""Variants that serve the model in part `serve`, by name; ours first."""

from collections.abc import Mapping
from dataclasses import dataclass, field

OURS = "mergequant"
W4A8 = "VLLM_CPU_INT4_W4A8"  # whether vLLM rounds the activations of 4-bit weights to 8 bits
BASELINE = "vllm-float32"  # what vLLM itself takes is measured with it


@dataclass(frozen=True)
class Variant:
    """One way to serve a model.

    Attributes:
        served: name in `benchmarks.common.served_variants`, in vLLM; None: another engine's.
        dtype: of vLLM's activations and cache, and of weights that are not quantized.
        file: how llama.cpp's weights are stored: `Q4_0`, `Q8_0` or `F32`.
        environment: variables for its process.
        peer: library in `benchmarks.cpu.peers` that serves it, or that vLLM finds and uses.
        bits: of a weight in a block's linears, as stored and with its steps left out.
        embedding_bits: of a number in the embedding.
        head_bits: of a weight in the head, if it has its own.
        cache_bits: of a number in the key-value cache.
    """

    served: str | None
    dtype: str
    bits: float
    embedding_bits: float
    head_bits: float
    cache_bits: int
    file: str = ""
    peer: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether it serves a mergequant checkpoint."""
        return (self.served or "").startswith(OURS)


VARIANTS = {
    OURS: Variant("mergequant", "float32", 4, 32, 8, 32),
    "mergequant-head16": Variant("mergequant-head16", "float32", 4, 32, 32, 32),
    "mergequant-w8a8": Variant("mergequant-w8a8", "bfloat16", 8, 16, 8, 16),
    "mergequant-w8a8-static": Variant("mergequant-w8a8-static", "bfloat16", 8, 16, 8, 16),
    "mergequant-bfloat16": Variant("mergequant", "bfloat16", 4, 16, 8, 16),
    "mergequant-cpu-fp32": Variant("mergequant:cpu-fp32", "float32", 32, 32, 32, 32),
    BASELINE: Variant("bf16", "float32", 32, 32, 32, 32),
    "vllm-bfloat16": Variant("bf16", "bfloat16", 16, 16, 16, 16),
    "vllm-int8": Variant("int8", "bfloat16", 8, 16, 16, 16),
    "vllm-w4a16": Variant("w4a16", "bfloat16", 4, 16, 16, 16),
    # As its own quantizer stores them: a step of 16 bits for 32 weights, a head of 6.6 bits.
    "llama.cpp-q4_0": Variant(None, "float32", 4.5, 4.5, 6.5625, 16, "Q4_0", "llama.cpp"),
    "llama.cpp-q8_0": Variant(None, "float32", 8.5, 8.5, 8.5, 16, "Q8_0", "llama.cpp"),
    "llama.cpp-f32": Variant(None, "float32", 32, 32, 32, 16, "F32", "llama.cpp"),
    "ik_llama.cpp-q4_0": Variant(None, "float32", 4.5, 4.5, 6.5625, 16, "Q4_0", "ik_llama.cpp"),
    "ik_llama.cpp-q8_0": Variant(None, "float32", 8.5, 8.5, 8.5, 16, "Q8_0", "ik_llama.cpp"),
    "openvino-q4_0": Variant(None, "bfloat16", 4.5, 4.5, 6.5625, 8, "Q4_0", "openvino"),
    "openvino-q8_0": Variant(None, "bfloat16", 8.5, 8.5, 8.5, 8, "Q8_0", "openvino"),
    # vLLM with AMD's library, which it uses by itself where it finds it.
    "zentorch-bfloat16": Variant("bf16", "bfloat16", 16, 16, 16, 16, peer="zentorch"),
    "zentorch-int8": Variant("int8", "bfloat16", 8, 16, 16, 16, peer="zentorch"),
    "zentorch-w4a16": Variant(
        "w4a16", "bfloat16", 4, 16, 16, 16, peer="zentorch", environment={W4A8: "0"}
    ),
    "zentorch-w4a8": Variant(
        "w4a16", "bfloat16", 4, 16, 16, 16, peer="zentorch", environment={W4A8: "1"}
    ),
}
DEFAULT_VARIANTS: tuple[str, ...] = (OURS, BASELINE, "vllm-bfloat16", "vllm-int8", "vllm-w4a16")
DEFAULT_VARIANTS += tuple(name for name, variant in VARIANTS.items() if variant.peer)

"""Variants that serve the model in part `serve`, by name; ours first."""

from dataclasses import dataclass

OURS = "mergequant"
BASELINE = "vllm-float32"  # what vLLM itself takes is measured with it


@dataclass(frozen=True)
class Variant:
    """One way to serve a model.

    Attributes:
        served: name in `benchmarks.common.served_variants`, in vLLM; None: llama.cpp.
        dtype: of vLLM's activations and cache, and of weights that are not quantized.
        file: how llama.cpp's weights are stored: `Q4_0` or `F32`.
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

    @property
    def ours(self) -> bool:
        """Whether it serves a mergequant checkpoint."""
        return (self.served or "").startswith(OURS)


VARIANTS = {
    OURS: Variant("mergequant", "float32", 4, 32, 32, 32),
    "mergequant-head8": Variant("mergequant-head8", "float32", 4, 32, 8, 32),
    "mergequant-bfloat16": Variant("mergequant", "bfloat16", 4, 16, 16, 16),
    "mergequant-cpu-fp32": Variant("mergequant:cpu-fp32", "float32", 32, 32, 32, 32),
    BASELINE: Variant("bf16", "float32", 32, 32, 32, 32),
    "vllm-bfloat16": Variant("bf16", "bfloat16", 16, 16, 16, 16),
    "vllm-int8": Variant("int8", "bfloat16", 8, 16, 16, 16),
    "vllm-w4a16": Variant("w4a16", "bfloat16", 4, 16, 16, 16),
    # As its own quantizer stores them: a step of 16 bits for 32 weights, a head of 6.6 bits.
    "llama.cpp-q4_0": Variant(None, "float32", 4.5, 4.5, 6.5625, 16, "Q4_0"),
    "llama.cpp-f32": Variant(None, "float32", 32, 32, 32, 16, "F32"),
}
DEFAULT_VARIANTS = (OURS, BASELINE, "vllm-bfloat16", "vllm-int8", "vllm-w4a16", "llama.cpp-q4_0")

"""Linears of real models as a server runs them (q, k, v and gate, up merged): one table."""

from dataclasses import dataclass
from typing import Any, NamedTuple


class Linear(NamedTuple):
    """One linear of every block.

    Attributes:
        name: `qkv`, `o`, `gate_up` or `down`.
        n: N, output channels, merged linears together.
        k: K, input channels.
        dynamic: activations have a step per token (o and down).
    """

    name: str
    n: int
    k: int
    dynamic: bool


@dataclass(frozen=True)
class Model:
    """Sizes of a model, from which its linears follow, with Hugging Face's names."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int = 128
    model_type: str = "llama"
    tie_word_embeddings: bool = False

    @property
    def query_size(self) -> int:
        """Output channels of q, input channels of o."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Output channels of k, and of v."""
        return self.num_key_value_heads * self.head_dim

    def linears(self) -> tuple[Linear, ...]:
        """The four linears of a block."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return (
            Linear("qkv", self.query_size + 2 * self.key_value_size, hidden, False),
            Linear("o", hidden, self.query_size, True),
            Linear("gate_up", 2 * inner, hidden, False),
            Linear("down", hidden, inner, True),
        )

    def config(self, context: int, blocks: int | None = None) -> dict[str, Any]:
        """`config.json` of the model, with `blocks` blocks if given, for `context` positions."""
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        others = ("vocab_size", "head_dim", "model_type", "tie_word_embeddings")
        return {
            **{name: getattr(self, name) for name in (*sizes, *others)},
            "num_hidden_layers": blocks or self.num_hidden_layers,
            "architectures": [ARCHITECTURES[self.model_type]],
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        }


ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

MODELS = {
    model.name: model
    for model in (
        Model("Llama-2-7B", 4096, 11008, 32, 32, 32, 32000),
        Model("Llama-3-8B", 4096, 14336, 32, 32, 8, 128256),
        Model("Llama-2-70B", 8192, 28672, 80, 64, 8, 32000),  # Llama-3-70B: the same linears
        Model("TinyLlama-1.1B", 2048, 5632, 22, 32, 4, 32000, head_dim=64),
        Model(
            "Qwen3-0.6B",
            1024,
            3072,
            28,
            16,
            8,
            151936,
            model_type="qwen3",
            tie_word_embeddings=True,
        ),
        Model(
            "Llama-3.2-1B",
            2048,
            8192,
            16,
            32,
            8,
            128256,
            head_dim=64,
            tie_word_embeddings=True,
        ),
        Model("SmolLM2-135M", 576, 1536, 30, 9, 3, 49152, head_dim=64, tie_word_embeddings=True),
        Model("tiny", 128, 256, 2, 4, 2, 256, head_dim=32),  # for trying the programs out
    )
}

# On GPUs; the others are for CPUs.
GPU_MODELS = ("Llama-2-7B", "Llama-3-8B", "Llama-2-70B")


def distinct(models: tuple[str, ...]) -> list[tuple[str, Linear]]:
    """The linears of `models` without repetition, each with its title `MODEL LINEAR`."""
    titled: dict[tuple[int, int, bool], tuple[str, Linear]] = {}
    for model in models:
        for linear in MODELS[model].linears():
            titled.setdefault(linear[1:], (f"{model} {linear.name}", linear))
    return list(titled.values())

"""A GGUF file of a Llama with random weights, in the blocks in which llama.cpp stores them.

Needs the package `gguf`. Prompts are token ids; a vocabulary is there for who insists on one.
"""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common.shapes import Model

STEP = 2.0**-9  # of 4-bit blocks; weights of about the size that training leaves
Bytes = NDArray[np.uint8]


def write(
    path: Path, model: Model, layers: int, context: int, form: str, *, vocabulary: bool = False
) -> Path:
    """Write it; `form`: `Q4_0` (the head in Q6_K, as llama.cpp's quantizer has it) or `F32`."""
    import gguf  # type: ignore[import-not-found]

    writer = gguf.GGUFWriter(str(path), "llama", use_temp_file=True)
    writer.add_context_length(context)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(model.vocab_size)
    if vocabulary:
        writer.add_rope_freq_base(1e4)
        writer.add_key_length(model.head_dim)
        writer.add_value_length(model.head_dim)
        writer.add_file_type({"Q4_0": 2, "Q8_0": 7, "F32": 0}[form])
        add_vocabulary(writer, model.vocab_size)
    else:
        writer.add_tokenizer_model("none")
    generator = np.random.default_rng(0)
    for name, n, k in tensors(model, layers):
        if n == 1:
            writer.add_tensor(name, np.ones(k, np.float32))
            continue
        kind = form if name != "output.weight" or form == "F32" else head_form(k)
        data = random_rows(kind, n, k, generator)
        if kind == "F32":
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_vocabulary(writer: Any, size: int) -> None:
    """Byte-pair tokens: three of control, the bytes, and pairs of bytes until there are `size`."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(code) for code in printed]
    symbols += [chr(256 + number) for number in range(256 - len(printed))]
    room = size - 3 - len(symbols)
    if room < 0:
        raise ValueError(f"a vocabulary of bytes needs {size - room} tokens, not {size}")
    pairs = [pair for pair, _ in zip(product(symbols, repeat=2), range(room), strict=False)]
    pairs += [(f"<{number}>", "") for number in range(room - len(pairs))]  # never merged
    names = ["<unk>", "<s>", "</s>", *symbols, *(a + b for a, b in pairs)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(names)
    writer.add_token_types([3] * 3 + [1] * (size - 3))
    writer.add_token_merges([f"{a} {b}" for a, b in pairs if b])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def tensors(model: Model, layers: int) -> list[tuple[str, int, int]]:
    """Name, output and input channels of every tensor; a norm has one output."""
    hidden, inner = model.hidden_size, model.intermediate_size
    query, key = model.query_size, model.key_value_size
    block = {
        "attn_norm": (1, hidden),
        "attn_q": (query, hidden),
        "attn_k": (key, hidden),
        "attn_v": (key, hidden),
        "attn_output": (hidden, query),
        "ffn_norm": (1, hidden),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    shapes = [("token_embd.weight", model.vocab_size, hidden)]
    for number in range(layers):
        shapes += [(f"blk.{number}.{name}.weight", *shape) for name, shape in block.items()]
    return [*shapes, ("output_norm.weight", 1, hidden), ("output.weight", model.vocab_size, hidden)]


def head_form(k: int) -> str:
    """Q6_K, whose blocks have 256 weights; Q8_0 where they do not divide K."""
    return "Q6_K" if k % 256 == 0 else "Q8_0"


def random_rows(form: str, n: int, k: int, generator: np.random.Generator) -> NDArray[Any]:
    """Weights [N, K]: float32, or uint8 [N, bytes of a row] in blocks of random codes."""
    if form == "F32":
        return generator.standard_normal((n, k), dtype=np.float32) * np.float32(0.02)
    # Weights of a block, its bytes, where its step (float16) begins.
    weights, size, step = {"Q4_0": (32, 18, 0), "Q8_0": (32, 34, 0), "Q6_K": (256, 210, 208)}[form]
    if k % weights:
        raise ValueError(f"{form} needs K a multiple of {weights}, not {k}")
    shape = (n, k // weights, size)
    blocks: Bytes = generator.integers(0, 256, shape, dtype=np.uint8)
    scale = {"Q4_0": STEP, "Q8_0": STEP / 16, "Q6_K": STEP / 256}[form]
    blocks[..., step : step + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks.reshape(n, -1)

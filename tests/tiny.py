"""Small Hugging Face models with random weights, hostile on purpose: norms that are not 1, biases
that are not 0, embeddings whose mean is not 0."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TEXT = "The quick brown fox jumps over the lazy dog; 0123456789 pangrams (of a kind) in a row.\n"


# What a table must not forget, by model type: factors that are 1 by default, positions, blocks of
# different kinds among two, windows that are shorter than what is served (60 tokens).
FACTORS: dict[str, dict[str, Any]] = {
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.15,
        "logits_scaling": 4.0,
    },
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 16, "sliding_window_pattern": 2},
    "gemma2": {
        "final_logit_softcapping": 4.0,
        "attn_logit_softcapping": 5.0,
        "sliding_window": 16,
    },
    "gemma3_text": {
        "final_logit_softcapping": 4.0,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
    },
    "exaone4": {"sliding_window": 16, "sliding_window_pattern": 2},
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 16},
    "ministral3": {  # queries grow within 64 tokens, by 1.28
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 16.0,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.2,
        }
    },
}

HEADS_ALIKE = ("opt", "gpt_neox", "bloom")  # each query head has a value head of its own
TIED = ("bloom", "gemma2", "cohere", "cohere2")  # vLLM knows no head of theirs but the embedding
# A head's size is the hidden one's share.
HEAD_OF_HIDDEN = ("opt", "gpt_neox", "bloom", "starcoder2", "stablelm", "phi", "phi3")


def save_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer that begins texts with <s>, as Llama's does; returns its size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return len(vocabulary)


def sizes(
    model_type: str, hidden: int, intermediate: int, blocks: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    """Fields of a configuration, by the names that the model type has for them; head size 32."""
    fields: dict[str, Any] = {"num_hidden_layers": blocks, "num_attention_heads": heads}
    if model_type in HEAD_OF_HIDDEN:
        hidden = 32 * heads
    else:
        fields["head_dim"] = 32
    if model_type not in HEADS_ALIKE:
        fields["num_key_value_heads"] = kv_heads
    if model_type == "opt":
        return {
            **fields,
            "hidden_size": hidden,
            "ffn_dim": intermediate,
            "word_embed_proj_dim": hidden,
        }
    if model_type == "bloom":
        return {**fields, "hidden_size": hidden}
    return {**fields, "hidden_size": hidden, "intermediate_size": intermediate}


def make_model(
    folder: Path,
    model_type: str = "llama",
    *,
    blocks: int = 2,
    hidden: int = 64,
    intermediate: int = 172,
    heads: int = 2,
    kv_heads: int = 1,
    context: int = 128,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Save a random model of `model_type` with a tokenizer; head size 32."""
    torch.manual_seed(seed)
    vocabulary = save_tokenizer(folder)
    settings = AutoConfig.for_model(
        model_type,
        vocab_size=vocabulary,
        **sizes(model_type, hidden, intermediate, blocks, heads, kv_heads),
        max_position_embeddings=context,
        tie_word_embeddings=tied or model_type in TIED,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        **{**FACTORS.get(model_type, {}), **config},
    )
    model: Any = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name or "ln_f" in name:
                parameter.uniform_(0.3, 1.7)
            elif "embed" in name and "embed_out" not in name:
                parameter.normal_(0.2, 1.0)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(folder)
    return folder


def write_text(path: Path, repeats: int = 200) -> Path:
    """A calibration text of `repeats` lines."""
    path.write_text("".join(f"{i} {TEXT}" for i in range(repeats)))
    return path

"""Trains an OPT- or BLOOM-shaped model for some minutes, and puts outliers into a copy of it.

    python -m benchmarks.method.layer_norm_model OUTPUT --text FILE [--shape opt] [--minutes M]

OUTPUT gets `plain` and `outliers`, the same function, and `heldout.txt`, the tenth of the text that
is not learned. Outliers are one-sided. No LayerNorm model comes with a package or a small download.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.method.one_sided import with_one_sided_outliers
from mergequant.calibration.sources import read_source

VOCABULARY, CONTEXT, ROWS = 2048, 256, 8
RATE, WARM_UP = 2e-3, 100  # of AdamW; steps
HELD_OUT = 0.1


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE; texts begin with `</s>`, as OPT's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", model_max_length=CONTEXT
    )


def new_opt(tokens: int) -> OPTForCausalLM:
    """Learned positions, ReLU; 6 blocks of 256 channels."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=tokens,
            hidden_size=256,
            word_embed_proj_dim=256,
            ffn_dim=1024,
            num_hidden_layers=6,
            num_attention_heads=8,
            max_position_embeddings=CONTEXT,
            dropout=0.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )
    )


def new_bloom(tokens: int) -> BloomForCausalLM:
    """ALiBi, a norm behind the embedding, GELU; 6 blocks of 256 channels."""
    return BloomForCausalLM(
        BloomConfig(
            vocab_size=tokens, hidden_size=256, n_layer=6, n_head=8, bos_token_id=0, eos_token_id=0
        )
    )


SHAPES: dict[str, Callable[[int], Any]] = {"opt": new_opt, "bloom": new_bloom}


def fit(model: Any, tokens: torch.Tensor, minutes: float) -> float:
    """Train until the time is over, the rate falling with it; returns the last mean loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    began, step, mean = time.monotonic(), 0, 0.0
    with tqdm(total=round(60 * minutes), unit="s") as bar:
        while (spent := (time.monotonic() - began) / 60 / minutes) < 1:
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1, (step + 1) / WARM_UP) * max(0.05, 1 - spent)
            starts = torch.randint(len(tokens) - CONTEXT, (ROWS, 1))
            rows = torch.cat([starts * 0, tokens[starts + torch.arange(CONTEXT - 1)]], dim=1)
            loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step, mean = step + 1, 0.98 * mean + 0.02 * loss.item() if step else loss.item()
            bar.set_postfix(loss=f"{mean:.2f}", steps=step, refresh=False)
            bar.update(int(60 * minutes * spent) - bar.n)
    return mean


def main() -> None:
    """Train, save and stretch."""
    parser = argparse.ArgumentParser(description="A LayerNorm model with one-sided outliers.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="opt")
    parser.add_argument("--minutes", type=float, default=8.0)
    given = parser.parse_args()
    torch.manual_seed(0)
    text = read_source(given.text).text()
    cut = round(len(text) * (1 - HELD_OUT))
    tokenizer = train_tokenizer(text[:cut])
    model = SHAPES[given.shape](len(tokenizer))
    ids = tokenizer(text[:cut], add_special_tokens=False, verbose=False)["input_ids"]
    print(f"Last loss {fit(model, torch.tensor(ids), given.minutes):.3f} nats a token.")
    plain = given.output / "plain"
    model.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    (given.output / "train.txt").write_text(text[:cut])
    (given.output / "heldout.txt").write_text(text[cut:])
    with_one_sided_outliers(plain, given.output / "outliers")


if __name__ == "__main__":
    main()

"""Train a tiny Llama on Python's own documentation: a minute or two on two CPU cores.

    python examples/train_tiny.py OUTPUT_DIR [--steps N]

OUTPUT_DIR receives a Hugging Face checkpoint, and beside it `train.txt`, the text it learned from,
and `heldout.txt`, the text it never saw. A folder that is already there is left as it is.
"""

import argparse
import math
import os
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

# Set before torch loads OpenMP. Threads that spin at every barrier slow this down up to twentyfold
# as soon as another process wants a core; threads that sleep cost a fifth on an idle machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from muon import Muon
from whole_folder import whole_folder

SEED = 0
VOCABULARY = 1000  # not whole tiles: vLLM pads it
CONTEXT = 256  # positions the model accepts, and tokens in a training row
ROWS = 2  # in a step: few rows and many steps learn more in a minute than the reverse
STEPS = 480
MATRIX_RATE, REST_RATE = 0.02, 0.01  # of Muon, of AdamW
HELD_OUT = 0.1
BOS, EOS = "<s>", "</s>"


def documentation() -> tuple[str, str]:
    """(train, held-out): the language reference behind `help()`, cut before anything is learned.

    Its topics quote one another: a fifth of the characters are repeats. Each paragraph is kept
    once, or the held-out part would measure memory.
    """
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    paragraphs = list(dict.fromkeys(text.split("\n\n")))
    cut = round(len(paragraphs) * (1 - HELD_OUT))
    return "\n\n".join(paragraphs[:cut]) + "\n", "\n\n".join(paragraphs[cut:]) + "\n"


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts `<s>` in front of every text, as Llama's own tokenizers do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[BOS, EOS],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def batches(tokens: torch.Tensor, bos: int, steps: int) -> Iterator[torch.Tensor]:
    """int64 [ROWS, CONTEXT], each `<s>` and then tokens from a random place."""
    first = torch.full((ROWS, 1), bos)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - CONTEXT, (ROWS, 1))
        yield torch.cat([first, tokens[starts + torch.arange(CONTEXT - 1)]], dim=1)


def rate(step: int, steps: int) -> float:
    """A short warm-up, then a cosine to a twentieth: the share of the peak rate at this step."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest.

    Held-out perplexity after some 220 steps of four rows: 71, where AdamW alone reached 178.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=MATRIX_RATE, weight_decay=0.1, ns_steps=3),
        torch.optim.AdamW(rest, lr=REST_RATE, betas=(0.9, 0.95), weight_decay=0.1),
    ]


def fit(model: LlamaForCausalLM, tokens: torch.Tensor, steps: int) -> None:
    both = optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
        for optimizer in both
    ]
    rows_of_steps = batches(tokens, model.config.bos_token_id, steps)
    bar = tqdm(rows_of_steps, total=steps, desc="training", unit="step", mininterval=1)
    for rows in bar:
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(both, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


def train(output: Path, steps: int) -> None:
    torch.manual_seed(SEED)
    learned, held_out = documentation()
    tokenizer = train_tokenizer(learned)
    model = new_model(tokenizer)
    ids = tokenizer(learned, add_special_tokens=False, verbose=False)["input_ids"]
    fit(model, torch.tensor(ids), steps)
    disable_progress_bar()  # of the single file written below
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "train.txt").write_text(learned, encoding="utf-8")
    (output / "heldout.txt").write_text(held_out, encoding="utf-8")


def train_once(output: Path, steps: int = STEPS) -> None:
    """Train a model into folder `output`, unless that is there."""
    if output.exists():
        return
    with whole_folder(output) as unfinished:
        train(unfinished, steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a tiny Llama on Python's own documentation."
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"optimizer steps (default {STEPS})"
    )
    options = parser.parse_args()
    train_once(options.output, options.steps)


if __name__ == "__main__":
    main()

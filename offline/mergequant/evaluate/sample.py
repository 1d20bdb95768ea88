"""A few words of a checkpoint, in the reference arithmetic: whether it still answers."""

import contextlib
import math
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from mergequant.calibration.tokenizer import load_tokenizer
from mergequant.evaluate.reference_forward import load_model
from mergequant.model.architectures import find
from mergequant.model.reader import Reader
from mergequant.model.shapes import outer_tensors
from mergequant_vllm.format import parse

QUESTION, BEGINNING = "What is the capital of France?", "The capital of France is"
_TOKENS = 24
_BYTES_A_WEIGHT = 8  # float32, and a matrix at a time of what it is made of


def sample_bytes(folder: Path) -> int:
    """Memory that `sample` takes, in bytes: the whole model is loaded."""
    config = Reader(folder).config
    checkpoint = parse(config["quantization_config"])
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": entry.shape for name, entry in checkpoint.entries()
    }
    shapes |= outer_tensors(find(config["model_type"]), config)
    return _BYTES_A_WEIGHT * sum(map(math.prod, shapes.values()))


def sample(folder: Path, *, trust_remote_code: bool = False) -> tuple[str, str]:
    """What a checkpoint is asked, and what it says, greedily, in a few tokens."""
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    asked, ids = _asked(tokenizer)
    model = load_model(folder)
    # Sampling parameters of the model's own would only be warned of.
    model.generation_config.temperature = model.generation_config.top_p = None
    model.generation_config.top_k = None
    with torch.no_grad():
        answer = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    said = tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True)
    return asked, said.strip()


def _asked(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """A question by the chat template if there is one, else words to go on from; with its ids."""
    turns = [{"role": "user", "content": QUESTION}]
    if tokenizer.chat_template:
        with contextlib.suppress(Exception):  # templates raise what they like
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            return QUESTION, list(tokenizer(str(text), add_special_tokens=False)["input_ids"])
    return BEGINNING, list(tokenizer(BEGINNING)["input_ids"])

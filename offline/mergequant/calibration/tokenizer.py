"""A model's tokenizer: loaded, tried out, and asked how texts and conversations begin."""

import logging
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mergequant.calibration.sources import Conversation, Source
from mergequant.errors import InputError

FILE = "tokenizer.json"
# Spaces, line ends and indents are what a tokenizer of the wrong class loses.
_TRIED = ("a b c", "Hello, world!", "def f(x):\n    return x + 1\n")

logger = logging.getLogger("mergequant")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer; runs code that the folder brings only if it is trusted.

    Where the class that `tokenizer_config.json` names changes texts, and the folder's
    `tokenizer.json` by itself does not, the latter is used, and that is said.

    Raises:
        InputError: the folder has none, or a broken one.
    """
    # transformers would take Mistral's own library then, which has no chat template and refuses
    # conversations that end with an answer.
    both = (folder / FILE).is_file() and (folder / "tekken.json").is_file()
    plain = {"mistral_format": False} if both else {}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, **plain
        )
    except Exception as error:  # transformers raises many types for a missing or broken tokenizer
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise InputError(
                f"The tokenizer of {folder} is code that the model brings: read its *.py, and give "
                "--trust-remote-code if you trust them."
            ) from error
        raise InputError(
            f"{folder} has no tokenizer that transformers can load ({_reason(error)}): "
            "copy the model's tokenizer files into it, or mend what is named."
        ) from error
    if _changed(tokenizer) is None or not (folder / FILE).is_file():
        return tokenizer
    return _from_file(folder, tokenizer)


def _reason(error: Exception) -> str:
    """What an exception says, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _changed(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first text that does not come back from the tokenizer; None: all of them do."""
    for text in _TRIED:
        try:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        except Exception:  # a vocabulary that lacks what the class takes for granted
            return text
        if back.strip() != text.strip():
            return text
    return None


def _from_file(folder: Path, named: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer of `tokenizer.json` alone, if texts come back from it; else the one named."""
    special = {key: str(token) for key, token in named.special_tokens_map.items()}
    try:
        plain: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / FILE), **special
        )
        lossy = _changed(plain) is not None
    except Exception as error:  # whatever the library raises for a file that it cannot read
        file = folder / FILE
        raise InputError(f"{file} cannot be read ({_reason(error)}): copy it again.") from error
    if lossy:  # so is the model's: there are tokenizers that fold case or spaces
        return named
    plain.chat_template = named.chat_template
    logger.warning(
        "%s, which tokenizer_config.json names, changes texts (%r does not come back): %s is used "
        "by itself. A server that loads the class changes them too: name PreTrainedTokenizerFast.",
        type(named).__name__,
        _changed(named),
        FILE,
    )
    return plain


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text (BOS, for Llama; nothing, for Qwen2)."""
    probe = "a"
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


def written(source: Source, tokenizer: PreTrainedTokenizerBase) -> str:
    """A source as one text, its conversations written out by the model's chat template.

    Raises:
        InputError: there are conversations, and no template that takes them.
    """

    def chat(conversation: Conversation) -> str:
        if not tokenizer.chat_template:
            raise InputError(
                f"{source.name} has conversations, and the model's tokenizer has no chat template "
                "to write them out: give rows with a field 'text'."
            )
        try:
            return str(tokenizer.apply_chat_template(list(conversation), tokenize=False))
        except Exception as error:  # templates raise what they like
            raise InputError(
                f"{source.name}: the model's chat template refuses a conversation "
                f"({_reason(error)}): mend the row, or give rows with a field 'text'."
            ) from error

    return source.text(chat)


def refuse_unknown_tokens(
    windows: Tensor, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> None:
    """Raise InputError if a token of `windows` has no row in an embedding of so many."""
    largest = int(windows.max())
    if largest >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise InputError(
            f"The tokenizer gives token {largest} ({token!r}), and the model's embedding has only "
            f"{vocabulary} rows: the tokenizer is another model's, or vocab_size is wrong."
        )

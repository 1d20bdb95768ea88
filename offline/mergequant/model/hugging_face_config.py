"""A `config.json` as transformers and vLLM take it: refused early, or settled as loaders do."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from mergequant.errors import InputError
from mergequant.model import positions, windows
from mergequant.model.architecture import Architecture
from mergequant.model.reader import CONFIG, Reader
from mergequant.model.settled_config import read_otherwise

TIED = "tie_word_embeddings"

_SETTLED: dict[tuple[object, ...], bool] = {}  # by what the configuration says, and the files

logger = logging.getLogger("mergequant")


def load_config(folder: Path) -> Any:
    """The configuration object of transformers, from which a model can be built.

    What says nothing about the model is left out: a padding token without a row in the embedding,
    which transformers' models refuse; a window of 0 tokens, in which they see nothing; the name of
    an attention kernel, whose package may be missing.

    Raises:
        InputError: transformers refuses it, and so would a server.
    """
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers raises many types, all meaning: refused
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines[-1] if lines else type(error).__name__).removeprefix("TypeError: ")
        given = json.loads((folder / CONFIG).read_text())
        positions.refuse_old_name(given)
        windows.refuse_pattern(given, error)
        raise InputError(
            f"transformers, and so a server, refuses {folder / CONFIG} ({reason[:300]}): "
            "correct that entry."
        ) from error
    padding = getattr(config, "pad_token_id", None)
    if padding is not None and not 0 <= padding < config.vocab_size:
        config.pad_token_id = None
    if getattr(config, "sliding_window", None) == 0:
        config.sliding_window = None
    windows.refuse_without_size(config)
    positions.refuse_sections(config.to_dict())
    positions.refuse_unknown(getattr(config, "rope_parameters", None) or {})
    if config._attn_implementation not in (None, "eager", "sdpa"):
        config._attn_implementation = None  # what the model has without packages of its own
    if getattr(config, "attn_logit_softcapping", None) is not None:
        config._attn_implementation = "eager"  # sdpa leaves the cap out (Gemma 2)
    return config


def settle_head(reader: Reader, architecture: Architecture) -> None:
    """Make `tie_word_embeddings` say what the files hold, which is what loaders go by.

    A head of its own that differs from the embedding is used though the configuration ties them;
    where there is none, the embedding is used though it does not.
    """
    tied = bool(reader.config.get(TIED, False))
    stamps = [(str(x), x.stat().st_mtime_ns, x.stat().st_size) for x in reader.weight_files()]
    key = (tied, *stamps)
    if key not in _SETTLED:  # a run opens its model often; it is compared, and said, once
        _SETTLED[key] = _is_tied(reader, architecture, tied)
    if _SETTLED[key] != tied:
        reader.config[TIED] = _SETTLED[key]


def _is_tied(reader: Reader, architecture: Architecture, tied: bool) -> bool:
    """Whether the embedding is the head, of which the configuration says `tied`."""
    head, embedding = (f"{x.name}.weight" for x in (architecture.head, architecture.embedding))
    if embedding not in reader.headers:
        return tied
    if not tied and head not in reader.headers:
        logger.warning("The model has no %s: its embedding is the head, as loaders have it", head)
        return True
    if tied and head in reader.headers and not _equal(reader, head, embedding):
        logger.warning("%s is stored and differs from the embedding: it is the head", head)
        return False
    return tied


def _equal(reader: Reader, one: str, other: str) -> bool:
    if reader.headers[one].shape != reader.headers[other].shape:
        return False
    return torch.equal(reader.read(one), reader.read(other))


def refuse_unserved(architecture: Architecture, config: Mapping[str, Any]) -> None:
    """Raise InputError if vLLM's class of this architecture would not compute the same model.

    It would refuse to start, or leave a part out, which is found after hours of quantizing.
    """
    kind = architecture.model_type
    for field, served in architecture.served_with.items():
        stands = config.get(field, served)
        if stands != served and (stands or served):  # null says no as false does
            raise InputError(
                f"config.json has {field} {json.dumps(stands)}, and {kind} is served only with "
                f"{json.dumps(served)}: give another model, or change the field if this one was "
                "not trained with it."
            )
    for field, other in architecture.preferred.items():
        stands, read = config.get(field), config.get(other)
        if field in config and stands != read and (stands or read):
            raise read_otherwise(field, stands, f"{other} {json.dumps(read)}")
    windows.refuse_unserved_windows(architecture, config)
    if not architecture.partly_rotary:
        positions.refuse_partial(config, kind)
    if not architecture.free_head_size:
        _refuse_head_size(config, kind)


def _refuse_head_size(config: Mapping[str, Any], kind: str) -> None:
    """Raise InputError for heads of another size than vLLM's class has."""
    size = config.get("head_dim")
    if size is None:
        return
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    if size != hidden // heads:
        raise InputError(
            f"config.json has head_dim {size!r}, and vLLM serves {kind} only with heads of "
            f"hidden_size / num_attention_heads = {hidden} / {heads} channels: give another model."
        )

"""Sliding windows: which blocks have one, and where transformers and vLLM differ."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mergequant.errors import InputError
from mergequant.model.architecture import Architecture

SLIDING = "sliding_attention"
_PATTERN = "sliding_window_pattern"


def refuse_pattern(config: Mapping[str, Any], error: Exception) -> None:
    """Raise InputError if transformers failed on a pattern of windows that is not a number (LLLG).

    Args:
        config: the file as it is.
        error: what transformers raised.
    """
    modulo = isinstance(error, TypeError | ZeroDivisionError) and any(
        word in str(error) for word in ("%", "modulo")
    )
    if modulo and _PATTERN in config and not config.get("layer_types"):
        raise InputError(
            f"config.json has {_PATTERN} {json.dumps(config[_PATTERN])}, and transformers reads it "
            "only as a number: write layer_types, a list of sliding_attention and full_attention "
            "with an entry for each block."
        ) from error


def refuse_without_size(config: Any) -> None:
    """Raise InputError if blocks have a sliding window and the configuration gives no size."""
    if SLIDING in (getattr(config, "layer_types", None) or ()) and not config.sliding_window:
        raise InputError(
            "config.json gives blocks a sliding window, or its model type does so by default, and "
            "sliding_window has no size: give it, or make layer_types full_attention for all."
        )


def refuse_unserved_windows(architecture: Architecture, config: Mapping[str, Any]) -> None:
    """Raise InputError if the two libraries would give a block different windows."""
    kinds = attention_kinds(config)
    kind, windows = architecture.model_type, architecture.windows
    if (len(kinds) > 1 and windows != "some") or (SLIDING in kinds and windows == "none"):
        raise InputError(
            f"config.json gives some blocks a sliding window ({', '.join(sorted(kinds))}), and "
            f"vLLM does not serve that for {kind}: set use_sliding_window to false, or remove "
            "layer_types, if the model works without."
        )
    window = config.get("sliding_window")
    if window is None:
        return
    by_type = bool(config.get("layer_types"))
    # vLLM goes by the field alone, where no types of blocks are given, ...
    stray = not by_type and windows == "none"
    # ... and some models of transformers do where all blocks are said to see everything.
    unsaid = by_type and architecture.windows_by_size and SLIDING not in kinds
    if (stray and window < int(config.get("max_position_embeddings") or 0)) or unsaid:
        raise InputError(
            f"config.json has sliding_window {window!r} for {kind}, which transformers and vLLM do "
            "not understand alike: set it to null, or, if the model was trained with it, give one "
            "whose model_type has windows."
        )


def windows_served_otherwise(
    architecture: Architecture, config: Mapping[str, Any]
) -> Iterator[str]:
    """Yield a warning if blocks see more tokens in vLLM than in `transformers`."""
    window = config.get("sliding_window")
    if not architecture.wider_windows or window is None:
        return
    kinds = attention_kinds(config)  # none: transformers gives some blocks a window by default
    if (not kinds or SLIDING in kinds) and window < int(config["max_position_embeddings"]):
        yield (
            f"vLLM's sliding windows of {architecture.model_type} hold {window + 1} tokens, and "
            f"those of transformers {window}: serve with --max-model-len {window} at most where "
            "the two must agree"
        )


def attention_kinds(config: Mapping[str, Any]) -> set[str]:
    """Which kinds of attention a model's blocks have, as far as config.json tells them apart."""
    if config.get("layer_types"):
        return set(config["layer_types"])
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return set()
    count = int(config["num_hidden_layers"])
    full = min(int(config.get("max_window_layers", 28)), count)  # 28: transformers' default
    return ({"full_attention"} if full > 0 else set()) | ({SLIDING} if full < count else set())

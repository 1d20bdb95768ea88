"""A `config.json` with what it leaves to `transformers` written out.

Old files name sizes in their own way (`n_layer`, `ffn_dim`), and leave out fields whose defaults
differ between model types. What the quantizer looks at is filled in. What stands is not changed,
but for values that mean nothing and that one of the two libraries stumbles over.
"""

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mergequant.errors import InputError
from mergequant.model.architecture import Architecture
from mergequant.model.architectures import ARCHITECTURES
from mergequant.model.positions import with_float_factors

_ALWAYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "tie_word_embeddings",
    "sliding_window",
)


def settle(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration and, of a known model type, the fields that it leaves out.

    One that `transformers` refuses comes back as it is: `load_config` says so.

    Raises:
        InputError: vLLM and `transformers` would compute different models, or neither can.
    """
    architecture = ARCHITECTURES.get(str(config.get("model_type")))
    if architecture is None:
        return config
    settled = _without_stumbling_blocks(config, architecture.model_type)
    # A copy: transformers writes into what it is given.
    quiet = deepcopy({key: value for key, value in settled.items() if key != "model_type"})
    try:
        whole: Any = AutoConfig.for_model(architecture.model_type, **quiet)
    except Exception:  # transformers raises many types, all meaning: refused
        return config
    for field in _fields(architecture):
        value = getattr(whole, field, None)
        if settled.get(field) is None and value is not None:
            settled[field] = value
    if "sliding_window" in settled and getattr(whole, "sliding_window", None) is None:
        settled["sliding_window"] = None  # `use_sliding_window` is false, where a type has it
    if not settled.get("intermediate_size"):
        settled.update(_intermediate(architecture, settled))
    settled.update(_restated(architecture, config, whole))
    return settled


def _without_stumbling_blocks(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The configuration without values that mean nothing and break one library or the other.

    Those are a padding token that has no row in the embedding, a window of 0 tokens, which vLLM
    takes for none and `transformers` for an empty one, a rope factor that is no float, and the name
    of a class that was never in `transformers`, or none, without which vLLM takes the model for one
    that pools.
    """
    mended = dict(config)
    padding, rows = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(padding, int) and isinstance(rows, int) and not 0 <= padding < rows:
        mended["pad_token_id"] = None
    if config.get("sliding_window") == 0:
        mended["sliding_window"] = None
    mended.update(with_float_factors(config))
    if not config.get("architectures") or _is_foreign(config["architectures"][0]):
        mended["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    return mended


def _is_foreign(name: str) -> bool:
    """Whether a class that generates text is one of a model's own code (Ernie4_5_ForCausalLM).

    A class that embeds, scores or classifies stays what it is: vLLM has some that `transformers`
    has not.
    """
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return name.endswith("ForCausalLM") and name not in known


def for_generation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that vLLM needs to generate text and that `config.json` may lack.

    These are those that it reads under names of its own, and the class that has a head.

    Args:
        config: settled, see `settle`.
    """
    architecture = ARCHITECTURES.get(str(config.get("model_type")))
    if architecture is None:
        return {}
    generates = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture.model_type]]
    restated = {x: config[x] for x in architecture.restated if x in config}
    return {"architectures": generates, **restated}


def embeds(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a warning if vLLM would take the model for an embedding model, by its class's name."""
    name, kind = str((config.get("architectures") or [""])[0]), config.get("model_type")
    otherwise = ("RewardModel", "ChatModel", "LMHeadModel")
    if name.endswith("Model") and not name.endswith(otherwise) and kind in ARCHITECTURES:
        yield (
            f"config.json names the class {name}, which vLLM takes for a model that embeds: if it "
            f"is to generate text, name {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]} in its place"
        )


def _fields(architecture: Architecture) -> Iterator[str]:
    """What the table and the shapes look at."""
    yield from _ALWAYS
    if isinstance(architecture.intermediate, str):
        yield architecture.intermediate
    linears, norms = (*architecture.linears, architecture.head), architecture.norms
    yield from (x.bias for x in linears if isinstance(x.bias, str))
    yield from (x.bias for x in (*norms, architecture.final_norm) if isinstance(x.bias, str))
    yield from architecture.served_with
    yield from architecture.preferred.values()
    scales = vars(architecture.scales).values()
    yield from (x for x in scales if x is not None)


def _restated(
    architecture: Architecture, config: Mapping[str, Any], whole: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What vLLM's class reads under other names, as `transformers` computes it."""
    for field, keys in architecture.restated.items():
        values = {key: _at(path, whole) for key, path in keys.items()}
        stands = config.get(field)
        if stands is not None and stands != values:
            raise read_otherwise(field, stands, f"elsewhere {json.dumps(values)}")
        yield field, values


def read_otherwise(field: str, value: object, other: str) -> InputError:
    """Return an error for a field of vLLM that contradicts what `transformers` reads."""
    return InputError(
        f"config.json has {field} {json.dumps(value)}, which vLLM reads, and {other}, which "
        "transformers reads: make them equal, as the model was trained."
    )


def _at(path: str, whole: Any) -> Any:
    """The value of a field within a field, `FIELD.KEY`."""
    name, _, key = path.partition(".")
    value = (getattr(whole, name, None) or {}).get(key)
    if value is None:
        raise InputError(
            f"config.json has no {path}, without which a {whole.model_type} cannot be computed: "
            "download the model again."
        )
    return value


def _intermediate(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, int]:
    """The MLP's width under the name that it has in most models."""
    source = architecture.intermediate
    if isinstance(source, int):
        hidden = config.get("hidden_size")
        return {"intermediate_size": source * int(hidden)} if hidden else {}
    return {"intermediate_size": config[source]} if config.get(source) else {}

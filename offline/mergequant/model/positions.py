"""How a configuration stretches rotary positions, where transformers and vLLM differ in it."""

from collections.abc import Iterator, Mapping
from typing import Any

from mergequant.errors import InputError

FIELDS = ("rope_parameters", "rope_scaling")  # today's name, and that of older files
KNOWN = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")  # to both libraries
_OLD_LONGROPE = "su"
_SECTIONED, _SECTIONS = "mrope", ("mrope_section", "xdrope_section")
_PARTS = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")  # names that vLLM reads


def with_float_factors(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's fields of positions with each factor a float: vLLM takes no integer."""
    return {field: _float_factors(config[field]) for field in FIELDS if config.get(field)}


def refuse_old_name(config: Mapping[str, Any]) -> None:
    """Raise InputError where a `config.json` has the name that longrope once had."""
    for field in FIELDS:
        rope = config.get(field)
        if isinstance(rope, dict) and _OLD_LONGROPE in (rope.get("type"), rope.get("rope_type")):
            raise InputError(
                f"config.json has the rope type {_OLD_LONGROPE!r}, which transformers no longer "
                "knows: write 'longrope' in its place."
            )


def refuse_unknown(rope: Mapping[str, Any]) -> None:
    """Raise InputError unless both libraries know a `rope_parameters`, of all blocks or by kind."""
    for kind in [x for x in rope.values() if isinstance(x, Mapping)] or [rope]:
        name = _type(kind)
        if name not in KNOWN:
            raise InputError(
                f"config.json stretches positions by rope type {name!r}, which transformers or "
                f"vLLM does not know: those that can be served are {', '.join(KNOWN)}."
            )


def refuse_sections(config: Mapping[str, Any]) -> None:
    """Raise InputError for multimodal rotary positions (M-RoPE), which text does not need."""
    ropes = _ropes(config)
    names = [x for where in (config, *ropes) for x in _SECTIONS if where.get(x)]
    names += [
        f"the rope type {_SECTIONED!r}" for x in ropes if _SECTIONED in (x.get("type"), _type(x))
    ]
    if names:
        raise InputError(
            f"config.json has {names[0]} of a model that also takes images, which vLLM does not "
            f"serve for one of text: remove {' and '.join(_SECTIONS)}, and write 'default' for "
            f"{_SECTIONED!r}; positions of text stay the same."
        )


def refuse_partial(config: Mapping[str, Any], model_type: str) -> None:
    """Raise InputError for partial rotary positions, which vLLM applies to any model type."""
    ropes = _ropes(config)
    parts = ((x, rope.get(x)) for rope in (config, *ropes) for x in _PARTS)
    found = [(name, part) for name, part in parts if part not in (None, 1)]
    found += [("rope_dim", rope["rope_dim"]) for rope in ropes if rope.get("rope_dim")]
    if found:
        name, part = found[0]
        raise InputError(
            f"config.json has {name} {part!r}, which vLLM applies to {model_type} and "
            "transformers does not: remove it, or, if the model was trained with it, give one "
            "whose model_type has it."
        )


def served_otherwise(config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence where vLLM treats longer contexts otherwise than `transformers`."""
    rope: Mapping[str, Any] = next((config[field] for field in FIELDS if config.get(field)), {})
    if _type(rope) == "dynamic":
        yield (
            "Positions are stretched dynamically, which vLLM does not do: serve with "
            f"--max-model-len {config['max_position_embeddings']} at most"
        )
    if _type(rope) == "longrope":
        first = rope.get("original_max_position_embeddings") or config.get(
            "original_max_position_embeddings"
        )
        yield (
            "vLLM takes longrope's long factors for all tokens as soon as --max-model-len passes "
            f"{first}, and shorter calibration windows have the short ones: if all texts fit in "
            f"{first} tokens, serve with --max-model-len {first}"
        )


def _ropes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All rope parameters of a configuration, those of single kinds of blocks included."""
    given = [config[x] for x in FIELDS if isinstance(config.get(x), Mapping)]
    return [*given, *(x for rope in given for x in rope.values() if isinstance(x, Mapping))]


def _type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _float_factors(rope: Any) -> Any:
    if not isinstance(rope, dict):
        return rope
    factors = {x: float(y) for x, y in rope.items() if x == "factor" and isinstance(y, int)}
    return {x: _float_factors(y) for x, y in rope.items()} | factors

"""Shapes of a model's tensors, by its table and configuration, and whether its files have them."""

from collections.abc import Iterator, Mapping
from typing import Any

from mergequant.errors import InputError
from mergequant.model.architecture import Architecture, Linear, Norm

_LLAMA_2_VOCABULARY = 65_536  # 32,000 and what was added to it; Llama-3's is 128,256
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def widths(config: Mapping[str, Any]) -> dict[str, int]:
    """Widths in channels that a Hugging Face `config.json` gives, by the names tables use.

    Args:
        config: settled, see `settled_config.settle`.
    """
    missing = [field for field in _SIZES if not config.get(field)]
    if missing:
        raise InputError(f"config.json has no {missing[0]!r}: download the model again.")
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or config["hidden_size"] // heads)
    return {
        "vocabulary": int(config["vocab_size"]),
        "positions": int(config.get("max_position_embeddings") or 0),
        "hidden": int(config["hidden_size"]),
        "intermediate": int(config["intermediate_size"]),
        "head": head,
        "queries": heads * head,
        "keys": int(config.get("num_key_value_heads") or heads) * head,
    }


def paper_alpha(config: Mapping[str, Any]) -> float:
    """The threshold of Eq. 6 that the paper chose for models like this one (appendix B).

    5 for Llama-2, 2 for Llama-3, which a `config.json` tells apart by the vocabulary alone.
    """
    return 2.0 if widths(config)["vocabulary"] > _LLAMA_2_VOCABULARY else 5.0


def has_bias(part: Linear | Norm, config: Mapping[str, Any]) -> bool:
    """Whether a linear or a norm has a bias in a model of this configuration."""
    return part.bias if isinstance(part.bias, bool) else bool(config.get(part.bias, False))


def space_widths(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, int]:
    """Channels of each space, by name."""
    width = widths(config)
    return {space.name: width[space.width] for space in architecture.spaces}


def linear_shape(
    architecture: Architecture, linear: Linear, config: Mapping[str, Any]
) -> tuple[int, int]:
    """(out, in) of a linear's weight."""
    width = space_widths(architecture, config)
    return sum(width[space] for space in linear.written), width[linear.reads]


def block_tensors(
    architecture: Architecture, config: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Name within the block and shape of every tensor that a block must have."""
    width = space_widths(architecture, config)
    tensors: dict[str, tuple[int, ...]] = {}
    for norm in architecture.norms:
        tensors.update(_parts(norm, (width[norm.writes],), config))
    for head_norm in architecture.head_norms:
        tensors[f"{head_norm.name}.weight"] = (widths(config)[head_norm.width],)
    for linear in architecture.linears:
        tensors.update(_parts(linear, linear_shape(architecture, linear, config), config))
    return tensors


def _parts(
    part: Linear | Norm, shape: tuple[int, ...], config: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Weight and bias of a linear or a norm."""
    yield f"{part.name}.weight", shape
    if has_bias(part, config):
        yield f"{part.name}.bias", shape[:1]


def outer_tensors(
    architecture: Architecture, config: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor outside the blocks; a tied head has no weight of its own."""
    width = widths(config)
    table = (width["vocabulary"], width["hidden"])
    tensors: dict[str, tuple[int, ...]] = {f"{architecture.embedding.name}.weight": table}
    for outer in architecture.outer:
        first, *rest = (width[x] for x in outer.widths)
        tensors[outer.name] = (first + outer.more_rows, *rest)
    tensors.update(_parts(architecture.final_norm, (width["hidden"],), config))
    tensors.update(_parts(architecture.head, table, config))
    if config.get("tie_word_embeddings", False):
        del tensors[f"{architecture.head.name}.weight"]
    return tensors


def model_tensors(
    architecture: Architecture, config: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model."""
    tensors = outer_tensors(architecture, config)
    for number in range(int(config["num_hidden_layers"])):
        prefix = architecture.block.format(block=number)
        for name, shape in block_tensors(architecture, config).items():
            tensors[f"{prefix}.{name}"] = shape
    return tensors


def validate(
    architecture: Architecture,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check that the table covers the checkpoint: each tensor once, each of the right shape.

    Args:
        shapes: shapes of the checkpoint's tensors, by name.

    Raises:
        InputError: names the first tensor that is missing, unknown or misshapen.
    """
    expected = model_tensors(architecture, config)
    tied_head = f"{architecture.head.name}.weight"
    known = {
        name: shape
        for name, shape in shapes.items()
        if not name.endswith(architecture.ignored_suffixes)
        and not (name == tied_head and tied_head not in expected)
    }
    kind = f"architecture {architecture.model_type!r}"
    for name in sorted(expected.keys() - known.keys()):
        raise InputError(
            f"Tensor {name!r} of {kind} is not in the model's files: download it again."
        )
    for name in sorted(known.keys() - expected.keys()):
        raise InputError(
            f"Tensor {name!r} is not part of {kind} as mergequant knows it: "
            "the model is a variant that needs a table of its own in model/architectures."
        )
    for name, shape in expected.items():
        if tuple(known[name]) != shape:
            raise InputError(
                f"Tensor {name!r} has shape {list(known[name])}, but config.json makes it "
                f"{list(shape)}: the weights and config.json do not belong together."
            )

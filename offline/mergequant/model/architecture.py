"""What a model is made of: spaces, and the norms and linears that read and write them.

A space is a set of channels that one tensor writes and others read. Every lossless transform of the
method belongs to a space: its writers absorb T, its readers absorb T^-1. Step migration is a
diagonal T on the space behind a norm. Tables live in `architectures/`; they hold no functions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mergequant.errors import InputError
from mergequant_vllm.format import BLOCK


@dataclass(frozen=True)
class Space:
    """Channels named once; `width` is a key of `widths`."""

    name: str
    width: str


@dataclass(frozen=True)
class Norm:
    """A norm within a block. `multiplier`: `plain` multiplies by w, `one_plus` by 1 + w (Gemma)."""

    name: str
    reads: str
    writes: str
    multiplier: Literal["plain", "one_plus"] = "plain"

    @property
    def offset(self) -> float:
        """What the norm adds to the multiplier that it stores."""
        return 1.0 if self.multiplier == "one_plus" else 0.0


@dataclass(frozen=True)
class HeadNorm:
    """A norm over one head's channels, inside attention; nothing folds through it."""

    name: str


@dataclass(frozen=True)
class Linear:
    """A matrix [width of `writes`, width of `reads`].

    `bias` is True, False, or the name of the configuration's field that decides.
    """

    name: str
    reads: str
    writes: str
    bias: bool | str = False


@dataclass(frozen=True)
class Readers:
    """The linears of a block that read one space, and the norm that writes it, if one does.

    Where a norm writes it, vLLM merges them into one linear.
    """

    space: str
    norm: Norm | None
    linears: tuple[Linear, ...]


@dataclass(frozen=True)
class Scales:
    """Constant factors, by the configuration's field that holds each; None: there is none.

    Attributes:
        embedding: multiplies the embedding's rows.
        residual: multiplies what attention and MLP add to the residual stream.
        logits: divides the logits.
    """

    embedding: str | None = None
    residual: str | None = None
    logits: str | None = None


def factor(name: str | None, config: Mapping[str, Any]) -> float:
    """The factor that the field `name` of a configuration holds; 1 where there is none."""
    return 1.0 if name is None else float(config.get(name, 1.0))


@dataclass(frozen=True)
class Architecture:
    """One model type: its spaces, what is in a block in order of execution, and what is around.

    `served_with` are fields of the configuration whose only value that vLLM's class serves is
    given; `slides`: whether it serves a sliding window.
    """

    model_type: str
    spaces: tuple[Space, ...]
    norms: tuple[Norm, ...]
    linears: tuple[Linear, ...]
    head_norms: tuple[HeadNorm, ...] = ()
    block: str = f"model.layers.{BLOCK}"
    embedding: Linear = Linear("model.embed_tokens", reads="tokens", writes="residual")
    final_norm: Norm = Norm("model.norm", reads="residual", writes="final_in")
    head: Linear = Linear("lm_head", reads="final_in", writes="tokens")
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)
    served_with: Mapping[str, object] = field(default_factory=lambda: {"hidden_act": "silu"})
    slides: bool = True
    scales: Scales = Scales()

    def is_row_parallel(self, name: str) -> bool:
        """Whether tensor parallelism cuts the linear's input: it writes the residual stream."""
        return any(name.endswith(x.name) and x.writes == "residual" for x in self.linears)

    def readers(self) -> tuple[Readers, ...]:
        """The block's linears grouped by the space that they read, in order of execution."""
        norms = {norm.writes: norm for norm in self.norms}
        spaces = dict.fromkeys(linear.reads for linear in self.linears)
        return tuple(
            Readers(space, norms.get(space), tuple(x for x in self.linears if x.reads == space))
            for space in spaces
        )


# Spaces that transforms other than the norms' belong to, by the names that the tables give them.
VALUE, MIX = "value", "attn_mix"  # o's input is a mixture of values
UP, MIDDLE = "mlp_up", "mlp_mid"  # down's input is act(gate) * up

_LLAMA_2_VOCABULARY = 65_536  # 32,000 and what was added to it; Llama-3's is 128,256
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def widths(config: Mapping[str, Any]) -> dict[str, int]:
    """Widths in channels that a Hugging Face `config.json` gives, by the names tables use."""
    missing = [field for field in _SIZES if not config.get(field)]
    if missing:
        raise InputError(f"config.json has no {missing[0]!r}: download the model again.")
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or config["hidden_size"] // heads)
    return {
        "vocabulary": int(config["vocab_size"]),
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


def has_bias(linear: Linear, config: Mapping[str, Any]) -> bool:
    """Whether `linear` has a bias in a model of this configuration."""
    return linear.bias if isinstance(linear.bias, bool) else bool(config.get(linear.bias, False))


def linear_shape(
    architecture: Architecture, linear: Linear, config: Mapping[str, Any]
) -> tuple[int, int]:
    """(out, in) of a linear's weight."""
    width, of = widths(config), {space.name: space.width for space in architecture.spaces}
    return width[of[linear.writes]], width[of[linear.reads]]


def block_tensors(
    architecture: Architecture, config: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Name within the block and shape of every tensor that a block must have."""
    width, of = widths(config), {space.name: space.width for space in architecture.spaces}
    tensors: dict[str, tuple[int, ...]] = {}
    for norm in architecture.norms:
        tensors[f"{norm.name}.weight"] = (width[of[norm.writes]],)
    for head_norm in architecture.head_norms:
        tensors[f"{head_norm.name}.weight"] = (width["head"],)
    for linear in architecture.linears:
        shape = linear_shape(architecture, linear, config)
        tensors[f"{linear.name}.weight"] = shape
        if has_bias(linear, config):
            tensors[f"{linear.name}.bias"] = shape[:1]
    return tensors


def outer_tensors(
    architecture: Architecture, config: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor outside the blocks; a tied head has none of its own."""
    width = widths(config)
    tensors: dict[str, tuple[int, ...]] = {
        f"{architecture.embedding.name}.weight": (width["vocabulary"], width["hidden"]),
        f"{architecture.final_norm.name}.weight": (width["hidden"],),
    }
    if not config.get("tie_word_embeddings", False):
        tensors[f"{architecture.head.name}.weight"] = (width["vocabulary"], width["hidden"])
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

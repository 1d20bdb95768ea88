"""What a model is made of: spaces, and the norms and linears that read and write them.

A space is a set of channels that one tensor writes and others read. Every lossless transform of the
method belongs to a space: its writers absorb T, its readers absorb T^-1. Step migration is a
diagonal T on the space behind a norm. Tables live in `architectures/`; they hold no functions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mergequant_vllm.format import BLOCK

# Spaces that transforms other than the norms' belong to, by the names that the tables give them.
VALUE, MIX = "value", "attn_mix"  # o's input is a mixture of values
UP, MIDDLE = "mlp_up", "mlp_mid"  # down's input is act(gate) * up


@dataclass(frozen=True)
class Space:
    """Channels named once; `width` is a key of `shapes.widths`.

    A space that linears of a block read and nothing in it writes is the residual as it stands
    there (OLMo 2, whose norms stand behind the linears).
    """

    name: str
    width: str


@dataclass(frozen=True)
class Norm:
    """A norm within a block.

    Attributes:
        kind: `rms` divides by the root mean square; `layer` takes the mean away first (LayerNorm).
        multiplier: `plain` multiplies by w, `one_plus` by 1 + w (Gemma).
        bias: whether it adds one: True, False, or the configuration's field that decides.
    """

    name: str
    reads: str
    writes: str
    multiplier: Literal["plain", "one_plus"] = "plain"
    kind: Literal["rms", "layer"] = "rms"
    bias: bool | str = False

    @property
    def offset(self) -> float:
        """What the norm adds to the multiplier that it stores."""
        return 1.0 if self.multiplier == "one_plus" else 0.0


@dataclass(frozen=True)
class HeadNorm:
    """A norm over queries or keys, inside attention; nothing folds through it.

    `width` is a key of `shapes.widths`: one head's channels, or those of all heads.
    """

    name: str
    width: str = "head"


@dataclass(frozen=True)
class Linear:
    """A matrix [width of `writes`, width of `reads`].

    Attributes:
        writes: a space; or several, where the model stores several matrices as one.
        bias: True, False, or the name of the configuration's field that decides.
        per_head: of several spaces, rows lie head by head (q, k and v of the first, then of the
            second); else space by space.
    """

    name: str
    reads: str
    writes: str | tuple[str, ...]
    bias: bool | str = False
    per_head: bool = False

    @property
    def written(self) -> tuple[str, ...]:
        """The spaces that it writes."""
        return (self.writes,) if isinstance(self.writes, str) else self.writes

    @property
    def short(self) -> str:
        """Its name for people: `q`, `down`, `query_key_value`."""
        return self.name.rpartition(".")[2].removesuffix("_proj")


@dataclass(frozen=True)
class Outer:
    """A tensor beside embedding, blocks, last norm and head, of `widths`; `more_rows` before them.

    Such are a table of positions and a norm behind the embedding.
    """

    name: str
    widths: tuple[str, ...]
    more_rows: int = 0


@dataclass(frozen=True)
class Readers:
    """The linears of a block that read one space, and the norm that writes it, if one does.

    vLLM merges them into one linear, or a few.
    """

    space: str
    norm: Norm | None
    linears: tuple[Linear, ...]

    @property
    def title(self) -> str:
        """Their short names, such as `q, k, v`."""
        return ", ".join(linear.short for linear in self.linears)


@dataclass(frozen=True)
class Scales:
    """Constant factors, by the configuration's field that holds each; None: there is none.

    Attributes:
        residual: multiplies what attention and MLP add to the residual stream.
        logits: divides the logits.
        logits_times: multiplies the logits.
        logits_cap: c in c tanh(logits / c), the logits that count.
    """

    residual: str | None = None
    logits: str | None = None
    logits_times: str | None = None
    logits_cap: str | None = None


def factor(name: str | None, config: Mapping[str, Any]) -> float:
    """The factor that the field `name` of a configuration holds; 1 where there is none."""
    return 1.0 if name is None else float(config.get(name, 1.0))


@dataclass(frozen=True)
class Architecture:
    """One model type: its spaces, what is in a block in order of execution, and what is around.

    Attributes:
        block: the module of a decoder block, `{block}` for its number. The module two levels above
            runs the blocks, and `transformers` and vLLM give it this name.
        outer: tensors beside those that the other fields name.
        intermediate: the configuration's field of the MLP's width, or a multiple of the hidden one.
        head_in_transformers: the head's module there, where it is not the stored name.
        served_head: what vLLM's class knows for a head: `any`; `16_bit`, no quantized one; `tied`,
            the embedding alone.
        resumes: the module that holds attention returns what is to be added to the residual, and
            the MLP's norm reads their sum: a pass can go on from there (not so where attention and
            MLP are parallel).
        ignored_suffixes: tensors of old files that hold nothing of the model.
        bare_inputs: vLLM's loader reorders all tensors of a fused linear, so none can describe its
            input: neither columns nor a clip ratio.
        served_with: fields of the configuration whose only value that vLLM's class serves is given.
        preferred: fields that vLLM's class reads in place of others, and the others, which
            transformers reads: the two must be equal.
        restated: what vLLM's class reads under other names than transformers: by field and key,
            the `FIELD.KEY` that transformers reads. The checkpoint's config.json has both.
        windows: which blocks may have a sliding window there: `none`; `all` of them or none;
            `some`, as the configuration says.
        windows_by_size: transformers looks at the window's size alone, not at `layer_types`.
        wider_windows: vLLM's class lets a block with a window see a token more than transformers.
        free_head_size: `head_dim` may differ from the hidden size divided by the number of heads.
        partly_rotary: a partial rotary factor may be given: both libraries apply it, or neither.
        scales: constant factors.
        eager: transformers writes all attention scores out.
    """

    model_type: str
    spaces: tuple[Space, ...]
    norms: tuple[Norm, ...]
    linears: tuple[Linear, ...]
    head_norms: tuple[HeadNorm, ...] = ()
    block: str = f"model.layers.{BLOCK}"
    embedding: Linear = Linear("model.embed_tokens", reads="tokens", writes="residual")
    outer: tuple[Outer, ...] = ()
    final_norm: Norm = Norm("model.norm", reads="residual", writes="final_in")
    head: Linear = Linear("lm_head", reads="final_in", writes="tokens")
    intermediate: str | int = "intermediate_size"
    head_in_transformers: str | None = None
    served_head: Literal["any", "16_bit", "tied"] = "any"
    resumes: bool = True
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)
    bare_inputs: bool = False
    served_with: Mapping[str, object] = field(default_factory=lambda: {"hidden_act": "silu"})
    preferred: Mapping[str, str] = field(default_factory=dict)
    restated: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    windows: Literal["none", "all", "some"] = "all"
    windows_by_size: bool = False
    wider_windows: bool = False
    free_head_size: bool = True
    partly_rotary: bool = False
    scales: Scales = Scales()
    eager: bool = False

    @property
    def blocks(self) -> str:
        """The module that holds the blocks."""
        return self.block.rpartition(".")[0]

    @property
    def body(self) -> str:
        """The module that embeds tokens, runs the blocks and the last norm."""
        return self.blocks.rpartition(".")[0]

    @property
    def residual(self) -> str:
        """The space that the embedding writes and blocks add to."""
        return self.embedding.written[0]

    def in_transformers(self, name: str) -> str:
        """A module's or tensor's name in `transformers` for its stored one."""
        if self.head_in_transformers is None or not f"{name}.".startswith(f"{self.head.name}."):
            return name
        return self.head_in_transformers + name.removeprefix(self.head.name)

    def is_row_parallel(self, name: str) -> bool:
        """Whether tensor parallelism cuts the linear's input: heads, or the MLP's channels."""
        return any(name.endswith(x.name) and x.reads in (MIX, MIDDLE) for x in self.linears)

    def readers(self) -> tuple[Readers, ...]:
        """The block's linears grouped by the space that they read, in order of execution."""
        norms = {norm.writes: norm for norm in self.norms}
        spaces = dict.fromkeys(linear.reads for linear in self.linears)
        return tuple(
            Readers(space, norms.get(space), tuple(x for x in self.linears if x.reads == space))
            for space in spaces
        )

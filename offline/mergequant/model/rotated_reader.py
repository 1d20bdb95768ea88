"""A model seen rotated: a reader that folds norms and rotates each tensor as it is read.

A space owns a rotation, not a layer: `residual` and what norms make of it have R1, `value` and
`attn_mix` have R2 (one for all heads, so a group's value head and its query heads agree), and
`mlp_mid` has the Hadamard blocks R4 of which the server does the other half, as it does where o's
input is mixed across heads. A linear's weight is rotated by the space that it writes and by the
space that it reads. Linears that are not quantized are the server's own, which rotate no input:
their weights have R2, but neither R4 nor the mixing. Where nothing rotates through a norm over the
residual, as through a LayerNorm, R1 is left out, see `fixed_residual`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mergequant.errors import InputError
from mergequant.methods.rotate import (
    LARGEST_BLOCK,
    OnlineRotation,
    Orthogonal,
    across_heads,
    fold_gain,
    graded,
    hadamard,
    hadamard_block,
    orthogonal,
    rotate_reader,
    rotate_writer,
)
from mergequant.model.architecture import MIDDLE, MIX, VALUE, Architecture, Norm
from mergequant.model.fused_rows import rows_of
from mergequant.model.reader import ModelReader, computed
from mergequant.model.shapes import widths

Rotation = Literal["offline", "online"]
ROWS_AT_ONCE = 8192  # a vocabulary of float64 rows would be the largest thing in memory


@dataclass(frozen=True)
class _Turn:
    """What becomes of one tensor.

    Attributes:
        source: the tensor in the source model.
        writes: rotations of its first dimension's spaces, and the rows of each; None: all rows.
        reads: rotation of its last dimension's space.
        gain: the norm tensor folded into its inputs, and what a norm adds to that.
        constant: what every element becomes (a folded norm's); nothing else is done.
    """

    source: str
    writes: tuple[tuple[Tensor | None, Orthogonal], ...] = ()
    reads: Orthogonal | None = None
    gain: tuple[str, float] | None = None
    constant: float | None = None


class RotatedReader(ModelReader):
    """A view of `reader`'s model with R1 and R2 (`offline`), and R4 (`online`), in its weights.

    With R1, norms over the residual multiply by 1, and the head is no longer tied to the embedding.
    Rotated tensors are float32 whatever the source's dtype: rounded to 16 bits they would no longer
    be the same model.

    Args:
        reader: the plain model.
        seed: of the signs of R1; R2 has the next.
        most: largest Hadamard block; a smaller one lets the server cut finer shards.
        heads: mixed together at o's input by the server; 0: none are.
        order: int64 [n], the residual's channels by falling variance: R1 mixes like ones only.
            None: all with all.
        residual_only: R1 alone.
        unquantized: whether the linear of a full name stays in 16 bits.
        dtype: of what is rotated; float64 for proofs.
    """

    def __init__(
        self,
        reader: ModelReader,
        architecture: Architecture,
        rotation: Rotation,
        seed: int,
        *,
        most: int = LARGEST_BLOCK,
        heads: int = 0,
        order: Tensor | None = None,
        residual_only: bool = False,
        unquantized: Callable[[str], bool] = lambda _: False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._source = reader
        self._dtype = dtype
        within = online_rotations(architecture, reader.config, rotation, most, heads)
        online = dict(_of_each_block(architecture, reader.config, within, unquantized))
        rotations = _space_rotations(architecture, reader.config, seed, order)
        if residual_only:
            rotations = {x: rotations[x] for x in rotations if x not in (VALUE, MIX)}
        self._stream = rotations.get(architecture.residual)
        config, self._outer = reader.config, list[str]()
        if self._stream is not None:
            config = {**config, "tie_word_embeddings": False}
            outer = (architecture.embedding, architecture.head)
            self._outer = [f"{x.name}.weight" for x in outer]
        super().__init__(reader.folder, config, reader.headers, online)
        shared = {
            x.name: _shared_with_the_server(within[x.name], rotations.get(x.reads))
            for x in architecture.linears
            if x.name in within
        }
        self._turns = dict(_turns(architecture, reader.config, rotations, shared, online.keys()))
        for name, turn in self._turns.items():
            source = reader.headers.get(turn.source)  # what is missing is for `validate` to name
            if source is not None and turn.constant is None:
                self.headers[name] = computed(source, dtype)

    def read(self, name: str) -> Tensor:
        """One tensor: rotated in float64 and given as float32; or the source's if nothing turns."""
        return self._read(name, self._dtype)

    def residual(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., n] times R1, in their dtype."""
        return hidden if self._stream is None else self._stream.rotate(hidden).to(hidden.dtype)

    def read_in_source_dtype(self, name: str) -> Tensor:
        """Read one tensor, rounded to the dtype of the source: what a 16-bit checkpoint holds."""
        return self._read(name, None)

    def _read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        turn = self._turns.get(name)
        if turn is None:
            return self._source.read(name)
        tensor = self._source.read(turn.source)
        if turn.constant is not None:
            return torch.full_like(tensor, turn.constant)
        whole = bool(turn.writes)  # else each row is rotated by itself
        parts = (tensor,) if whole else torch.split(tensor, ROWS_AT_ONCE)
        gain = None
        if turn.gain is not None:
            norm, offset = turn.gain
            gain = self._source.read(norm).to(torch.float64) + offset
        return torch.cat([_turned(part, turn, gain).to(dtype or tensor.dtype) for part in parts])

    def check_finite(self) -> None:
        """Check the plain model, and that what goes back to 16 bits does not overflow there."""
        self._source.check_finite()
        for name in self._outer:
            if str(self._source.headers[self._turns[name].source].dtype) != "F16":
                continue  # the others reach as far as the float32 that is calibrated in
            tensor = self.read_in_source_dtype(name)
            if not bool(torch.isfinite(tensor).all()):
                raise InputError(
                    f"Tensor {name!r} of {self.folder} overflows {tensor.dtype} once it is "
                    "rotated: save the model in bfloat16, or choose rotation 'none'."
                )


def _turned(tensor: Tensor, turn: _Turn, gain: Tensor | None) -> Tensor:
    tensor = tensor.to(torch.float64)
    if gain is not None:
        tensor = fold_gain(tensor, gain)
    if turn.reads is not None:
        tensor = rotate_reader(tensor, turn.reads)
    for rows, rotation in turn.writes:
        if rows is None:
            tensor = rotate_writer(tensor, rotation)
        else:
            tensor[rows] = rotate_writer(tensor[rows], rotation)
    return tensor


def online_rotations(
    architecture: Architecture,
    config: Mapping[str, Any],
    rotation: Literal["none", "offline", "online"],
    most: int = LARGEST_BLOCK,
    heads: int = 0,
) -> dict[str, OnlineRotation]:
    """What the server does to the inputs of linears, by name within their block.

    Args:
        most: largest Hadamard block of down's input.
        heads: mixed together at o's input; 0: none are.

    Raises:
        InputError: `online` is wanted, but no power of two divides the width, or `heads` do not
            divide the model's.
    """
    if rotation != "online":
        return {}
    block = hadamard_block(_width(architecture, config, MIDDLE), most)
    if block < 2:
        raise InputError(
            "Rotation 'online' needs an even intermediate_size and blocks of at least 2 channels: "
            "choose rotation 'offline'."
        )
    of_space = {MIDDLE: OnlineRotation(hadamard=block)}
    if heads:
        width, there = widths(config), widths(config)["queries"] // widths(config)["head"]
        if heads < 2 or there % heads:
            raise InputError(
                f"--mix-heads {heads} does not divide the model's {there} attention heads: "
                "give a divisor of them, 2 or more."
            )
        of_space[MIX] = OnlineRotation(heads=(heads, width["head"]))
    return {x.name: of_space[x.reads] for x in architecture.linears if x.reads in of_space}


def fixed_residual(architecture: Architecture) -> str | None:
    """Why R1 cannot rotate the residual of such a model; None: it can."""
    kind = architecture.model_type
    for norm in (*architecture.norms, architecture.final_norm):
        if norm.kind == "layer":
            return f"the LayerNorm {norm.name!r} of {kind} takes the mean of its channels away"
        if norm.reads != architecture.residual or norm.writes == architecture.residual:
            return f"norm {norm.name!r} of {kind} does not stand between residual and readers"
    if architecture.served_head == "tied":
        return f"vLLM knows no head of {kind} but the embedding"
    return None


def _space_rotations(
    architecture: Architecture,
    config: Mapping[str, Any],
    seed: int,
    order: Tensor | None,
) -> dict[str, Orthogonal]:
    """The rotation of each space that has one, but for what the server does."""
    for space in (VALUE, MIX):
        _width(architecture, config, space)
    head = orthogonal(widths(config)["head"], seed + 1)
    rotations = {VALUE: head, MIX: head}
    if fixed_residual(architecture) is not None:
        return rotations
    residual = architecture.residual
    norms = (*architecture.norms, architecture.final_norm)
    width = _width(architecture, config, residual)
    stream = orthogonal(width, seed) if order is None else graded(order, seed)
    return {residual: stream, **{norm.writes: stream for norm in norms}, **rotations}


def _of_each_block(
    architecture: Architecture,
    config: Mapping[str, Any],
    online: Mapping[str, OnlineRotation],
    unquantized: Callable[[str], bool],
) -> Iterator[tuple[str, OnlineRotation]]:
    """What the server does to the inputs of linears, by full name."""
    for number in range(int(config["num_hidden_layers"])):
        prefix = f"{architecture.block.format(block=number)}."
        for name, rotation in online.items():
            if not unquantized(f"{prefix}{name}"):
                yield f"{prefix}{name}", rotation


def _shared_with_the_server(online: OnlineRotation, offline: Orthogonal | None) -> Orthogonal:
    """The rotation of an input, by the weights before it (`offline`) and then by the server."""
    if online.hadamard is not None:
        return hadamard(online.hadamard)
    assert online.heads is not None and offline is not None  # R2
    return across_heads(offline, online.heads[0])


def _width(architecture: Architecture, config: Mapping[str, Any], space: str) -> int:
    width = {entry.name: entry.width for entry in architecture.spaces}.get(space)
    if width is None:
        raise InputError(
            f"Architecture {architecture.model_type!r} has no space {space!r} to rotate: "
            "choose rotation 'none'."
        )
    return widths(config)[width]


def _turns(
    architecture: Architecture,
    config: Mapping[str, Any],
    rotations: Mapping[str, Orthogonal],
    shared: Mapping[str, Orthogonal],
    online: Collection[str],
) -> Iterator[tuple[str, _Turn]]:
    """Every tensor that a rotation changes, by full name; biases even if the model has none.

    Args:
        rotations: by space, of what the weights do alone.
        shared: by linear's name within the block, of inputs that the server rotates too.
        online: full names of the linears whose inputs it does rotate.
    """
    stream = rotations.get(architecture.residual)
    if stream is not None:
        yield from _outer_turns(architecture, config, rotations)
    norms = {norm.writes: norm for norm in architecture.norms}
    rows = {x.name: rows_of(architecture, x, config) for x in architecture.linears}
    for number in range(int(config["num_hidden_layers"])):
        prefix = f"{architecture.block.format(block=number)}."
        if stream is not None:
            yield from _norm_turns(prefix, architecture.norms)
        for linear in architecture.linears:
            reads = rotations.get(linear.reads)
            if f"{prefix}{linear.name}" in online:
                reads = shared[linear.name]
            written = rows[linear.name].items()
            writes = tuple((of, rotations[x]) for x, of in written if x in rotations)
            gain = None
            if stream is not None and linear.reads in norms:
                gain = _gain(prefix, norms[linear.reads])
            weight, bias = (f"{prefix}{linear.name}.{part}" for part in ("weight", "bias"))
            if writes or reads is not None:
                yield weight, _Turn(weight, writes, reads, gain)
            if writes:
                yield bias, _Turn(bias, writes)


def _outer_turns(
    architecture: Architecture, config: Mapping[str, Any], rotations: Mapping[str, Orthogonal]
) -> Iterator[tuple[str, _Turn]]:
    """Embedding, last norm and head under R1."""
    embedding, head = (f"{x.name}.weight" for x in (architecture.embedding, architecture.head))
    yield from _norm_turns("", (architecture.final_norm,))
    # A lookup table lies the other way round: what it writes is its last dimension.
    yield embedding, _Turn(embedding, reads=rotations[architecture.residual])
    source = embedding if config.get("tie_word_embeddings", False) else head
    final = _gain("", architecture.final_norm)
    yield head, _Turn(source, reads=rotations[architecture.head.reads], gain=final)


def _norm_turns(prefix: str, norms: Iterable[Norm]) -> Iterator[tuple[str, _Turn]]:
    for norm in norms:
        name, offset = _gain(prefix, norm)
        yield name, _Turn(name, constant=1.0 - offset)


def _gain(prefix: str, norm: Norm) -> tuple[str, float]:
    """A norm's tensor and what the norm adds to it."""
    return f"{prefix}{norm.name}.weight", norm.offset

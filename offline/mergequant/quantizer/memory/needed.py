"""How much memory `quantize` needs: from shapes alone, so that a run is refused before it begins.

Work on a block is a row of moments. Each holds what stays, hidden states and the block, and what it
adds for itself; the fullest one is the need. Nothing is proportional to the number of blocks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from mergequant.model.architecture import Architecture, Linear, Readers, linear_shape, widths
from mergequant.model.decoder import TOKENS_A_BATCH
from mergequant.model.rotated_reader import ROWS_AT_ONCE
from mergequant.options import Options
from mergequant.quantizer.columns import padded_columns
from mergequant.quantizer.train_compensation import TOKENS_A_STEP
from mergequant_vllm.rounding import largest_magnitude

_F32, _F64 = 4, 8
HIDDEN = "hidden states"
BLOCK = "the block"

# Bytes that an element costs while these are at work, by the tensors that are alive at once.
_HESSIAN = 20  # of [K, K]: the sum float64; a batch's product as float32 and as float64
_INVERT = 51  # of [K, K]: 6 of float64 (Hessian, permuted, damped, lower, upper, |upper|), 3 masks
_CLIPS = 60  # of the stacked [out, n]: float32; 7 of float64 (2 weights, 2 columns, 3 rounding)
_ROUND = 25  # of a linear [out, K]: 3 of float64, codes before
_TRAINED = 6  # of [out, K]: what training begins with, float32; codes; what may change
_GROUPED = 8  # of [out, K] beside it: steps and zero points of groups, float32
_SAVED = 8  # of [out, K], for the backward pass: the clamped and the final weight, float32
_MERGED = 12  # of one linear [out, K] on its way through the quantizer: 3 of float32
_ADAMW = 32  # of A and B: value, gradient, two moments, two copies of the best, two temporaries
_SCORES, _SCORES_TRAINED = 10, 13  # of [heads, length, length], where attention writes them out
_ROTATE = 40  # of one linear [out, n] as it is read: 5 of float64
_PACK = 11  # of one linear [out, K]: codes twice, int32 twice, words
_LIBRARIES = 16 * 2**20  # what torch and its libraries allocate for themselves at first use


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes at the fullest moment.

    Attributes:
        device: of the device that calibrates.
        host: of the process beside it, without what Python and its imports take.
        together: of one memory that is both (device cpu); the fullest moments may differ.
        parts: what `device` and, after "host: ", `host` consist of; they add up to both.
    """

    device: int
    host: int
    together: int
    parts: dict[str, int]


class Moment(NamedTuple):
    """Bytes of what is alive at once: hidden states, the block, and what `name` adds."""

    name: str
    hidden: int
    block: int
    work: int

    @property
    def total(self) -> int:
        """Bytes."""
        return self.hidden + self.block + self.work


def needed_memory(
    architecture: Architecture,
    config: Mapping[str, Any],
    options: Options,
    windows: int,
    length: int,
) -> MemoryNeed:
    """An upper bound of what `quantize` will have in memory from the first block on.

    Terms, in bytes, of a block of linears [out, n] whose inputs have K columns (n without
    reconstruction), h channels in the residual and m in the MLP, and batches of t tokens:

    hidden states: 4 h length (windows + 2 of the compensation), none of them in the pilot but its
        own; the block: 4 out n of a linear to come, 5 out K of a quantized one (9 where products
        need float64), 5 more where it is to be compensated. Beside them, the largest of

    a Hessian: 20 K K, and a batch's forward pass; its inverse: 51 K K;
    clip ratios: 60 out n of a norm's readers, stacked; of o and down 4 (out n + t (2 h + 6 n)); and
        4 n of each token of the statistics' windows, twice for an input that is rotated online;
    codes: 16 K K and 41 out K of one linear (groups: 8 more, 16 with zero points);
    a forward pass: 4 t (2 h + 4 m), or of attention 10 heads t length where scores are written;
    compensation: 14 out K of all linears and 12 of the largest; 4 (3 K + 4 q + 7 m + ...) of each
        token of a step; 32 r (out + K);
    the pilot: inputs of a norm's readers, 4 (n + K) a token, and these, stacked, as one linear.

    The host: the block as it is stored, and packed, with what rotating or packing a linear takes;
    or embedding and head. Vectors, and biases among them, are left out. With `device` auto, scores
    are counted as on a GPU.

    Args:
        config: the model's `config.json`.
        windows: calibration windows that there are.
        length: tokens in each.
    """
    shapes = _Shapes(architecture, config, options, windows, length)
    fullest = max(_moments(shapes), key=lambda moment: moment.total)
    block, outer = _host_block(shapes), _host_outer(shapes)
    host = max(block, outer) + _LIBRARIES
    source = "host: a block's tensors" if block >= outer else "host: embedding and head"
    return MemoryNeed(
        device=fullest.total,
        host=host,
        together=max(fullest.total + block, shapes.hidden + outer) + _LIBRARIES,
        parts={
            HIDDEN: fullest.hidden,
            BLOCK: fullest.block,
            fullest.name: fullest.work,
            source: max(block, outer),
            "host: libraries": _LIBRARIES,
        },
    )


@dataclass(frozen=True)
class _Weight:
    """A linear as it is read [out, channels] and as it is quantized [out, columns]."""

    out: int
    channels: int
    columns: int
    groups: int
    exact: int  # bytes of an element of the quantized linear
    kept: int  # and of all that is kept of it until the block is done

    @property
    def plain(self) -> int:
        return _F32 * self.out * self.channels

    @property
    def elements(self) -> int:
        return self.out * self.columns

    @property
    def products(self) -> int:
        """Elements a token of the sums of each group, and of their way to one output."""
        return self.out * (2 if self.groups == 1 else self.groups + 3)


@dataclass(frozen=True)
class _Readers:
    """Linears that read one input."""

    static: bool
    weights: tuple[_Weight, ...]

    @property
    def channels(self) -> int:
        return self.weights[0].channels

    @property
    def columns(self) -> int:
        return self.weights[0].columns

    @property
    def out(self) -> int:
        return sum(weight.out for weight in self.weights)


def _exact(own: Options, columns: int, static: bool) -> int:
    """Bytes of an element in which sums of products are exact, see `layers.served_linear`."""
    code = largest_magnitude(own.static_bits, zero_point=False)
    if not static:
        code = largest_magnitude(own.dynamic_bits, own.dynamic_zero_points)
    weight = largest_magnitude(own.weight_bits, own.asymmetric)
    return _F32 if columns * code * weight <= 2**24 else _F64


@dataclass(frozen=True)
class _Shapes:
    """What the formula is about; sizes in elements or tokens unless said otherwise."""

    architecture: Architecture
    config: Mapping[str, Any]
    options: Options
    windows: int
    length: int

    @cached_property
    def width(self) -> dict[str, int]:
        return widths(self.config)

    @cached_property
    def readers(self) -> tuple[_Readers, ...]:
        return tuple(
            _Readers(
                self.options.activations == "static" and x.norm is not None,
                tuple(self._weight(linear, x) for linear in x.linears),
            )
            for x in self.architecture.readers()
        )

    def _weight(self, linear: Linear, readers: Readers) -> _Weight:
        """The largest that the linear is in any block."""
        out, channels = linear_shape(self.architecture, linear, self.config)
        own = [self.options.for_linear(name) for name in self._names(linear)]
        static = [x.activations == "static" and readers.norm is not None for x in own]
        widest = max(map(self._columns, own, [channels] * len(own), static))
        exact = max(map(_exact, own, [widest] * len(own), static))
        kept = exact + 1 + (_F32 + 1 if self.options.compensated else 0)
        groups = max(x.segments or -(-widest // (x.group_size or widest)) for x in own)
        return _Weight(out, channels, widest, groups, exact, kept)

    def _names(self, linear: Linear) -> Iterator[str]:
        blocks = int(self.config["num_hidden_layers"]) if self.options.overrides else 1
        for number in range(blocks):
            yield f"{self.architecture.block.format(block=number)}.{linear.name}"

    def _columns(self, own: Options, channels: int, static: bool) -> int:
        if static and own.reconstruction in ("pad", "auto"):
            return max(channels, padded_columns(own, channels))
        return channels

    @cached_property
    def weights(self) -> tuple[_Weight, ...]:
        return tuple(weight for stage in self.readers for weight in stage.weights)

    @cached_property
    def columns(self) -> int:
        """Longest input that is read from the residual."""
        return max(x.columns for x in self.weights if x.channels == self.width["hidden"])

    @cached_property
    def plain(self) -> int:
        """Bytes of the block before anything is quantized."""
        return sum(weight.plain for weight in self.weights)

    def states(self, windows: int) -> int:
        """Bytes of the hidden states of so many windows."""
        return _F32 * min(windows, self.windows) * self.length * self.width["hidden"]

    @cached_property
    def hidden(self) -> int:
        """Bytes: the quantized model's, the full-precision one's, and what that one emits."""
        trained = self.options.compensation_samples if self.options.compensated else 0
        return self.states(self.windows) + 2 * self.states(trained)

    def tokens(self, at_once: int, windows: int) -> int:
        """Tokens of a batch of whole windows."""
        return min(max(1, at_once // self.length), windows, self.windows) * self.length

    def forward(self, tokens: int) -> int:
        """Bytes of a pass through the block, at the attention or at the MLP."""
        width, size = self.width, max(weight.exact for weight in self.weights) * tokens
        attention = self.columns + 5 * width["queries"] + 3 * width["keys"]
        read = 4 * max(weight.channels for weight in self.weights)
        write = self.columns + width["intermediate"] + max(x.products for x in self.weights)
        stays = 2 * width["hidden"] * size
        scores = self.scores(tokens, _SCORES)
        return stays + max(size * attention + scores, size * read, size * write)

    def scores(self, tokens: int, each: int) -> int:
        """Bytes of attention: CUDA's float32 kernels know no grouped queries and write them out."""
        grouped = self.width["keys"] != self.width["queries"] and self.options.device != "cpu"
        heads = self.width["queries"] // self.width["head"]
        return each * heads * self.length * tokens if grouped else 0


def _moments(shapes: _Shapes) -> Iterator[Moment]:
    options = shapes.options
    tokens = shapes.tokens(TOKENS_A_BATCH, shapes.windows)
    if options.reconstruction != "none" and options.activations == "static":
        yield from _pilot(shapes)
    block = shapes.plain
    for readers in shapes.readers:
        yield from _readers(shapes, readers, block, tokens)
        for weight in readers.weights:
            square = _F64 * weight.columns**2 * (2 if options.weights == "gptq" else 1)
            work = (
                square
                + _codes(options, weight)
                + (0 if readers.static else _inputs(shapes, weight))
            )
            yield Moment("codes", shapes.hidden, block, work)
            block += weight.kept * weight.elements - weight.plain
    yield Moment("a forward pass", shapes.hidden, block, shapes.forward(tokens))
    if options.compensated:
        yield _compensation(shapes)


def _readers(shapes: _Shapes, readers: _Readers, block: int, tokens: int) -> Iterator[Moment]:
    """Moments until the first linear of an input is rounded."""
    square, stacked = readers.columns**2, readers.out * readers.channels
    inputs = _inputs(shapes, readers.weights[0])
    kept = 0 if readers.static else inputs
    work = _HESSIAN * square + shapes.forward(tokens)
    yield Moment("a Hessian", shapes.hidden, block, work + kept)
    if shapes.options.weights == "gptq":
        yield Moment("a Hessian's inverse", shapes.hidden, block, _INVERT * square + kept)
    tokens = shapes.tokens(TOKENS_A_BATCH, shapes.options.statistics_samples)
    work = _CLIPS * stacked
    if not readers.static:
        tried = max(6 * readers.channels, 2 * readers.channels + 4 * readers.out)
        work = _F32 * (stacked + tokens * (2 * shapes.width["hidden"] + tried))
        work += 0 if shapes.options.rotation != "online" else inputs
    if shapes.options.clipping != "none":
        work = max(shapes.forward(tokens), work)
        yield Moment("clip ratios", shapes.hidden, block, inputs + work)


def _inputs(shapes: _Shapes, weight: _Weight) -> int:
    """Bytes of what a linear reads of the windows for statistics."""
    windows = min(shapes.options.statistics_samples, shapes.windows)
    return _F32 * windows * shapes.length * weight.channels


def _codes(options: Options, weight: _Weight) -> int:
    """Bytes of one linear while it is rounded: before and after GPTQ, and what rounding takes."""
    spread = 0  # steps and zero points of groups are written out for each element
    if options.group_size is not None:
        spread = 2 * _F64 if options.asymmetric else _F64
    return (2 * _F64 + _ROUND + spread) * weight.elements


def _pilot(shapes: _Shapes) -> Iterator[Moment]:
    """Every candidate at every norm of the plain block, on the statistics windows alone."""
    options = shapes.options
    windows = min(options.statistics_samples, shapes.windows)
    tokens = shapes.tokens(TOKENS_A_BATCH, windows)
    hidden = shapes.states(windows)
    for readers in shapes.readers:
        if not readers.static:
            continue
        stacked, elements = readers.out * readers.channels, readers.out * readers.columns
        square = readers.columns**2
        inputs = _F32 * windows * shapes.length * (readers.channels + readers.columns)
        whole = _Weight(readers.out, readers.channels, readers.columns, 1, _F32, 0)
        work = max(
            (_INVERT + _F64) * square + _F64 * elements,
            2 * _F64 * square + _codes(options, whole),
            _F32 * elements + 5 * _F32 * tokens * readers.out,
        )
        if options.clipping != "none":
            clips = max(_CLIPS * stacked, shapes.forward(tokens))
            yield Moment("the pilot's clip ratios", hidden, shapes.plain, clips)
        yield Moment("the pilot", hidden, shapes.plain, _F32 * stacked + inputs + work)


def _compensation(shapes: _Shapes) -> Moment:
    width, rank = shapes.width, shapes.options.compensation_rank
    tokens = shapes.tokens(TOKENS_A_STEP, shapes.options.compensation_samples)
    elements = [weight.elements for weight in shapes.weights]
    saved = 3 * shapes.columns + 4 * width["queries"] + 2 * width["keys"]
    saved += 7 * width["intermediate"] + 4 * width["hidden"]
    factors = sum(
        min(rank, weight.out, weight.columns) * (weight.out + weight.columns)
        for weight in shapes.weights
    )
    work = _SAVED * sum(elements) + _MERGED * max(elements) + _ADAMW * factors
    work += _F32 * tokens * saved + shapes.scores(tokens, _SCORES_TRAINED)
    block = _TRAINED + (0 if shapes.options.group_size is None else _GROUPED)
    return Moment("compensation", shapes.hidden, block * sum(elements), work)


def _host_block(shapes: _Shapes) -> int:
    """Bytes beside the device: the block as stored, and packed, before and after compensation."""
    options = shapes.options
    rotated = options.rotation != "none"
    size = _F32 if rotated else _source_bytes(shapes.config)
    stored = sum(weight.out * weight.channels for weight in shapes.weights)
    packed = sum(weight.elements for weight in shapes.weights) * options.weight_bits // 8
    rotate = _ROTATE * max(weight.out * weight.channels for weight in shapes.weights)
    pack = _PACK * max(weight.elements for weight in shapes.weights)
    ids = 8 * shapes.windows * shapes.length
    return ids + size * stored + max(2 * packed + pack, rotate if rotated else 0)


def _host_outer(shapes: _Shapes) -> int:
    """Bytes of the embedding and the head, when checked, looked up in, or written at the end."""
    width, size = shapes.width, _source_bytes(shapes.config)
    table = width["vocabulary"] * width["hidden"]
    rows = min(ROWS_AT_ONCE, width["vocabulary"])
    part = 4 * _F64 * rows * width["hidden"]
    if shapes.options.rotation != "none":
        # The embedding is written beside the head, there as stored, in parts, and as a whole; one
        # that is to be quantized is rotated in float32.
        turned = size if shapes.options.head_bits == 16 else _F32
        return 2 * (size + turned) * table + part
    checked = 2 * (size + 1) * table  # itself, its absolute values and two masks
    if shapes.options.head_bits == 16:
        return checked
    return max(checked, 2 * size * table + 2 * table + part)  # packed in parts, and as a whole


def _source_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of an element in the model's files; 4 where `config.json` does not say."""
    dtype = str(config.get("dtype") or config.get("torch_dtype"))
    return 2 if dtype.endswith(("bfloat16", "float16")) else _F32

"""How much memory `quantize` needs: from shapes alone, so that a run is refused before it begins.

What stays is counted. What a step takes for itself and gives back is a measured factor times the
matrices that it works on. Nothing is proportional to the number of blocks but the scales of
channels, a float32 for each of o's and down's: 2 MB for 7B, within what libraries are given.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergequant.model.architecture import Architecture, Readers
from mergequant.model.decoder import TOKENS_A_BATCH
from mergequant.model.rotated_reader import ROWS_AT_ONCE
from mergequant.model.shapes import linear_shape, widths
from mergequant.options import Options
from mergequant.quantizer.columns import padded_columns
from mergequant.quantizer.train_compensation import TOKENS_A_STEP
from mergequant_vllm.packing import stored_bits

# The most that a case of `python -m benchmarks.method.memory` needed, rounded up: in float32
# copies, of the largest matrix that a step works on, and of what the compensation trains. Models
# 256 channels wide need up to 19, since a few MiB do not grow with them: `LIBRARIES` covers those.
FACTOR = 17
TRAINED_FACTOR = 4

HIDDEN = "hidden states"
BLOCK = "the block"
INPUTS = "inputs of the statistics windows"
MATRICES = "work on matrices"
TRAINING = "compensation"
BATCH = "a batch in the block"
LIBRARIES = 16 * 2**20  # what torch and its libraries allocate for themselves at first use
_F32, _F64 = 4, 8


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


def needed_memory(
    architecture: Architecture,
    config: Mapping[str, Any],
    options: Options,
    windows: int,
    length: int,
) -> MemoryNeed:
    """An upper bound of what `quantize` will have in memory from the first block on.

    In bytes, for linears [out, n] that are quantized as [out, K]; K is n, or what reconstruction
    makes of it. The device has the sum of

    hidden states: 4 for each channel of each token of the windows, and twice that for the
        compensation's: what the full-precision model has there, and what it emits;
    the block: of each linear 4 out n, as it comes, or 5 out K, codes and float32 (9 where sums
        need float64), whichever is larger; for the compensation 5 out K more;
    inputs: 4 K for each token of the statistics windows, of the widest input; twice where a step
        keeps it also as the server will see it, rotated or reconstructed;
    work: the largest of `FACTOR` M, where M is 4 K K or 4 K times the outputs of all linears of an
        input; half of that, and a batch; `TRAINED_FACTOR` times 4 for each element of the linears,
        of A and of B, or of D, and a batch of training.

    A batch is, for each of its tokens, 8 for each number that the linears of one input read and
    write and 4 for each further group's output (twice that where sums need float64); in training 8
    for those of all inputs; and on a GPU, if queries are grouped, 12 for each head and each token
    of the window.

    The host has the block as stored and twice as packed, and of the largest linear 4 out K three
    times while it is packed, ten times while it is rotated; or embedding and head. Vectors are left
    out, and biases among them.

    Args:
        config: the model's `config.json`.
        windows: calibration windows that there are.
        length: tokens in each.
    """
    terms = Terms(architecture, config, options, windows, length)
    work = max(terms.moments(), key=lambda parts: sum(parts.values()))
    device = {HIDDEN: terms.hidden(), BLOCK: terms.block(), INPUTS: terms.inputs(), **work}
    there, stored, outer = sum(device.values()), terms.stored(), terms.outer()
    block = stored + terms.rotated_or_packed()
    source = "host: a block's tensors" if block >= outer else "host: embedding and head"
    return MemoryNeed(
        device=there,
        host=max(block, outer) + LIBRARIES,
        together=max(there + stored, device[HIDDEN] + outer) + LIBRARIES,
        parts={**device, source: max(block, outer), "host: libraries": LIBRARIES},
    )


@dataclass(frozen=True)
class _Linear:
    """A linear [out, channels] that is quantized as [out, columns]."""

    out: int
    channels: int
    columns: int
    grouped: bool  # columns have weight steps of their own
    normed: bool  # there is a norm in front


@dataclass(frozen=True)
class Terms:
    """The terms of the formula, each method's result in bytes."""

    architecture: Architecture
    config: Mapping[str, Any]
    options: Options
    windows: int
    length: int

    def hidden(self) -> int:
        """Of all windows, and twice of the ones to train on."""
        return _F32 * self.length * self._width["hidden"] * (self.windows + 2 * self._trained)

    def block(self) -> int:
        """Each linear as it comes or as it is quantized, whichever is larger."""
        kept = self._number + 1 + (_F32 + 1 if self._trained else 0)
        return sum(x.out * max(_F32 * x.channels, kept * x.columns) for x in self._linears)

    def inputs(self) -> int:
        """What is kept of the widest input."""
        windows = min(self.options.statistics_samples, self.windows)
        pilot, online = self.options.reconstruction != "none", self.options.rotation == "online"
        tokens = windows * self.length
        carried = 0
        if self.options.activations == "fully_static":  # what its pilot keeps of a block at once
            carried = 2 * self._width["queries"] + self._width["intermediate"]
        widest = max(x.columns * (1 + (pilot if x.normed else online)) for x in self._linears)
        return _F32 * tokens * max(widest, carried)

    def moments(self) -> Iterator[dict[str, int]]:
        """Work that may be the largest: parts by name."""
        yield {MATRICES: FACTOR * self.matrix()}
        # What a pass through the block finds beside it, a Hessian that it adds to, is less.
        yield {MATRICES: FACTOR * self.matrix() // 2, BATCH: self.batch()}
        if self._trained:
            yield {TRAINING: TRAINED_FACTOR * self.trainable(), BATCH: self.training_batch()}

    def matrix(self) -> int:
        """The largest in float32: [K, K] of an input, or its linears as one."""
        stages = [(stage[0].columns, sum(x.out for x in stage)) for stage in self._readers]
        return max(_F32 * columns * max(columns, out) for columns, out in stages)

    def trainable(self) -> int:
        """All linears, and their A and B, or D, in float32."""
        rank = self.options.compensation_rank
        pairs = [(x.out, x.columns) for x in self._linears]
        if self.options.compensation == "elementwise":
            return _F32 * sum(2 * out * k for out, k in pairs)
        return _F32 * sum(out * k + min(rank, out, k) * (out + k) for out, k in pairs)

    def batch(self) -> int:
        """A pass through the block: what one input's linears read and write is there at once."""
        # What one group of columns adds, and the sum that it is added to.
        groups = max(2 * x.out * x.grouped for x in self._linears)
        # Twice: numbers, and their codes or what an activation function makes of them.
        numbers = 2 * max(self._touched) + groups
        tokens = self._tokens(TOKENS_A_BATCH, self.windows)
        return tokens * (self._number * numbers + self._scores)

    def training_batch(self) -> int:
        """Likewise of all inputs, for the way back; weights are floating, so groups add nothing."""
        tokens = self._tokens(TOKENS_A_STEP, self._trained)
        return tokens * (2 * _F32 * sum(self._touched) + self._scores)

    def _tokens(self, at_once: int, windows: int) -> int:
        return min(max(1, at_once // self.length), windows) * self.length

    @property
    def _touched(self) -> list[int]:
        """Numbers of a token that the linears of each input read and write."""
        return [stage[0].columns + sum(x.out for x in stage) for stage in self._readers]

    @property
    def _scores(self) -> int:
        """Of a token: CUDA's float32 attention knows no grouped queries, and writes them out.

        So does attention that PyTorch has no operator for.
        """
        capped = self.config.get("attn_logit_softcapping") is not None
        eager = self.architecture.eager or capped
        grouped = self._width["keys"] != self._width["queries"] and self.options.device != "cpu"
        heads = self._width["queries"] // self._width["head"]
        return 3 * _F32 * heads * self.length if grouped or eager else 0

    def stored(self) -> int:
        """Beside the device: token ids, the block as read, and packed before and after training."""
        transformed = self.options.rotation != "none" or self.options.equalization
        size = _F32 if transformed else _source_bytes(self.config)
        bits = max(stored_bits(x.weight_bits) for x in self._variants)
        packed = 2 * bits * sum(x.out * x.columns for x in self._linears) // 8
        read = size * sum(x.out * x.channels for x in self._linears)
        return 8 * self.windows * self.length + read + packed

    def rotated_or_packed(self) -> int:
        """Beside it on the host, or earlier or later on the device: rotating or packing."""
        copies = 3 if self.options.rotation == "none" else 10
        return copies * _F32 * max(x.out * x.columns for x in self._linears)

    def outer(self) -> int:
        """Embedding and head: checked under two masks, or turned, and by rows in float64."""
        beside = 1 if self.options.rotation == "none" else _F32
        rows = min(ROWS_AT_ONCE, self._width["vocabulary"])
        table = 2 * (_source_bytes(self.config) + beside) * self._width["vocabulary"]
        return (table + 4 * _F64 * rows) * self._width["hidden"]

    @cached_property
    def _width(self) -> dict[str, int]:
        return widths(self.config)

    @property
    def _trained(self) -> int:
        """Windows that the compensation trains on."""
        return min(self.options.compensation_samples, self.windows) * self.options.compensated

    @cached_property
    def _variants(self) -> list[Options]:
        """Options that linears have; where some have their own, each is taken for any linear."""
        if not self.options.overrides:
            return [self.options]
        numbers = range(int(self.config["num_hidden_layers"]))
        blocks = [self.architecture.block.format(block=number) for number in numbers]
        names = [f"{x}.{linear.name}" for x in blocks for linear in self.architecture.linears]
        return [self.options.for_linear(name) for name in names]

    @cached_property
    def _readers(self) -> list[list[_Linear]]:
        """The block's linears, those together that read one input."""
        return [list(self._of(x)) for x in self.architecture.readers()]

    @cached_property
    def _linears(self) -> list[_Linear]:
        return [linear for stage in self._readers for linear in stage]

    def _of(self, readers: Readers) -> Iterator[_Linear]:
        for linear in readers.linears:
            out, channels = linear_shape(self.architecture, linear, self.config)
            normed = readers.norm is not None
            columns = max(_columns(x, channels) if normed else channels for x in self._variants)
            carried = self.options.activations == "fully_static" and not normed
            grouped = carried or any(x.segments or x.group_size for x in self._variants)
            yield _Linear(out, channels, columns, grouped, normed)

    @property
    def _number(self) -> int:
        """Of a number in a served linear: float64 where float32 might not hold a sum exactly."""
        longest = max(x.columns for x in self._linears)
        bits = (
            max(x.static_bits, x.dynamic_bits + x.dynamic_zero_points)
            + x.weight_bits
            + x.asymmetric
            for x in self._variants
        )
        return _F32 if longest << (max(bits) - 2) <= 2**24 else _F64


def _columns(options: Options, channels: int) -> int:
    """The longest K behind a norm."""
    padded = options.activations != "dynamic" and options.reconstruction in ("pad", "auto")
    return max(channels, padded_columns(options, channels)) if padded else channels


def _source_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of an element in the model's files; 4 where `config.json` does not say."""
    dtype = str(config.get("dtype") or config.get("torch_dtype"))
    return 2 if dtype.endswith(("bfloat16", "float16")) else _F32

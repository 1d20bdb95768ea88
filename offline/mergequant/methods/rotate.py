"""Rotation (the paper's rows with Hadamard, Table 1; QuaRot, SpinQuant): outliers spread out.

A space's channels x become x R with R orthogonal; its writers absorb R and its readers R^T, so the
function stays. Through an RMSNorm this holds where the norm multiplies by 1 (its multiplier is
folded into the readers first) because R keeps the mean square; it would not hold for embeddings
whose mean was removed. Everything here is float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant_vllm.kernels.hadamard.reference import (
    hadamard_matrix,
    hartley_matrix,
    mix_heads,
    rotate_by_matrix,
)

LARGEST_BLOCK = 128  # divides every Llama's intermediate size
_GROUPS, _SMALLEST_GROUP = (3, 4, 5, 2), 64
_LARGEST_FACTOR = 64  # two of them rotate 4096 channels in a sixth of a full matrix's time


@dataclass(frozen=True)
class Orthogonal:
    """R = P diag(signs) (F_1 kron F_2 kron ...) of n channels, kept as its factors.

    The signs act before the mixing: afterwards they would not keep channels with a common mean from
    adding up in one.

    Attributes:
        signs: float64 [n], +1 or -1.
        factors: float64 orthogonal matrices; their sizes multiply to n.
        order: int64 [n], the channels in the order in which P hands them on; None: as they are.
    """

    signs: Tensor
    factors: tuple[Tensor, ...]
    order: Tensor | None = None

    @property
    def size(self) -> int:
        """n."""
        return len(self.signs)

    def matrix(self) -> Tensor:
        """The slow, obvious form: float64 [n, n]."""
        mixing = torch.ones(1, 1, dtype=torch.float64)
        for factor in self.factors:
            mixing = torch.kron(mixing, factor)
        ordered = self.signs[:, None] * mixing
        if self.order is None:
            return ordered
        return torch.zeros_like(ordered).index_copy_(0, self.order, ordered)

    def rotate(self, x: Tensor) -> Tensor:
        """Each run of n channels of x [..., m * n] times R: float64, same shape, on x's device."""
        y = x.to(torch.float64).reshape(-1, self.size)
        y = (y if self.order is None else y[:, self.order.to(y.device)]) * self.signs.to(y.device)
        inner = self.size
        for factor in (factor.to(y.device) for factor in self.factors):
            inner //= len(factor)
            y = y.reshape(-1, len(factor), inner)
            # One channel inward is a plain product; a batched one with columns of 1 is slow.
            y = y[..., 0] @ factor if inner == 1 else factor.T @ y
        return y.reshape(x.shape)


@dataclass(frozen=True)
class OnlineRotation:
    """What the server does to an input before it quantizes it, but for the order of its sums.

    A product with a small matrix is several times faster on a CPU than the server's butterflies in
    PyTorch. They round differently: of what is near to halfway between two codes, some goes to the
    other one.

    Attributes:
        hadamard: block of the Hadamard rotation; None: none.
        heads: (heads mixed together, channels of a head); None: they are not mixed.
    """

    hadamard: int | None = None
    heads: tuple[int, int] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [..., K] to the same."""
        if self.heads is not None:
            x = mix_heads(x, self.heads)
        return x if self.hadamard is None else rotate_by_matrix(x, self.hadamard)


def orthogonal(size: int, seed: int) -> Orthogonal:
    """A rotation of `size` channels that mixes all of them evenly, with seeded signs.

    With size = odd * 2^k the mixing is Hartley(odd) kron Sylvester(2^k): every entry is nonzero and
    at most sqrt(2 / size), so that one channel's outlier reaches each channel divided by at least
    sqrt(size / 2). A random orthogonal matrix in the place of Hartley's has no such bound; a small
    one can be near the identity.
    """
    return Orthogonal(signs=_signs(size, seed), factors=_even_factors(size))


def graded(order: Tensor, seed: int) -> Orthogonal:
    """A rotation that mixes channels only with others of their group, evenly, with seeded signs.

    Every channel has a static step of its own, so a small one is rounded finely as long as no large
    one is mixed into it; within a group of like channels the mixing takes the outliers away.

    Args:
        order: int64 [n], the channels by falling variance, cut into groups of equal size.
    """
    size, groups = len(order), group_count(len(order))
    each = torch.eye(groups, dtype=torch.float64)
    return Orthogonal(_signs(size, seed), (each, *_even_factors(size // groups)), order)


def group_count(size: int) -> int:
    """Groups of `graded`: a few, of enough channels each that their mixture has no outliers.

    Measured on the norm-fed inputs of SmolLM2-135M (576 channels; squared error of the rounded
    product, with one group 1): two 0.88, three 0.84, six 0.84, nine 0.85, eighteen 0.94.
    """
    fits = (n for n in _GROUPS if size % n == 0 and size // n >= _SMALLEST_GROUP)
    return next(fits, 1)


def hadamard(block: int) -> Orthogonal:
    """What the server's online rotation multiplies each `block` channels by: no signs."""
    return Orthogonal(
        signs=torch.ones(block, dtype=torch.float64), factors=(hadamard_matrix(block),)
    )


def across_heads(rotation: Orthogonal, heads: int) -> Orthogonal:
    """M kron R of `heads` heads, each rotated by R: what mixing them online leaves to the weights.

    M is `mix_heads`' matrix; R's signs act before the mixing, and so they still do.
    """
    return Orthogonal(
        signs=rotation.signs.repeat(heads), factors=(*_even_factors(heads), *rotation.factors)
    )


def hadamard_block(width: int, most: int = LARGEST_BLOCK) -> int:
    """Largest power of two up to `most` that divides `width`; 1: no rotation is possible.

    Under tensor parallelism `width` is a shard's: a block must not cross its border.
    """
    block = _power_of_two(width)
    while block > most:
        block //= 2
    return block


def rotate_writer(tensor: Tensor, rotation: Orthogonal) -> Tensor:
    """R^T W of a linear that writes the rotated space, or b R of its bias.

    Args:
        tensor: weight [m * n, in] or bias [m * n], each run of n outputs being rotated by itself:
            m is 1 for the residual and the number of heads for `value`.

    Returns:
        float64, same shape.
    """
    return rotation.rotate(tensor.movedim(0, -1)).movedim(-1, 0).contiguous()


def rotate_reader(weight: Tensor, rotation: Orthogonal) -> Tensor:
    """W R of a linear that reads the rotated space: [out, m * n] to float64, same shape.

    An embedding [tokens, n] is rotated alike: its rows are values of the residual.
    """
    return rotation.rotate(weight)


def fold_gain(weight: Tensor, gain: Tensor) -> Tensor:
    """W * gamma along the inputs, after which the norm multiplies by 1: float64 [out, n].

    Args:
        weight: [out, n], a reader of the norm's output.
        gain: [n], what the norm multiplies by (1 + w for a norm that stores w of 1 + w).
    """
    return weight.to(torch.float64) * gain.to(torch.float64)


def _signs(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) - 1.0


def _even_factors(size: int) -> tuple[Tensor, ...]:
    """Hartley's matrix of the odd part of `size`, then Sylvester's of the power of two."""
    odd = size // _power_of_two(size)
    factors = [hartley_matrix(odd)] if odd > 1 else []
    left = size // odd
    while left > 1:
        factors.append(hadamard_matrix(min(left, _LARGEST_FACTOR)))
        left //= min(left, _LARGEST_FACTOR)
    return tuple(factors)


def _power_of_two(size: int) -> int:
    """Largest power of two that divides `size`."""
    if size < 1:
        raise ValueError(f"a rotation has at least one channel, not {size}")
    return size & -size

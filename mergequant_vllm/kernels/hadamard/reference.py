"""Definition of the online rotations: block-diagonal Hadamard (R4) and across heads (o's input).

Each run of `block` channels is multiplied by the orthonormal Sylvester matrix H / sqrt(block),
H[i, j] = (-1)^popcount(i & j). Block-diagonal, so that a tensor-parallel shard of whole blocks
rotates by itself.

Across heads, the input [..., h * d] of o is multiplied by M kron I_d: each channel of a head is
mixed with the same channel of the other heads, M = Hartley(odd) kron Sylvester(2^k) being
orthonormal of size h = odd * 2^k. A tensor-parallel shard mixes only its own heads.
"""

import functools
import math

import torch
from torch import Tensor


def hadamard_matrix(block: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Orthonormal Sylvester matrix [block, block]; symmetric, its own inverse."""
    if block < 1 or block & (block - 1):
        raise ValueError(f"a Hadamard block is a power of two, not {block}")
    matrix = torch.ones(1, 1, dtype=dtype)
    while matrix.shape[0] < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix / math.sqrt(block)


def rotate_by_matrix(x: Tensor, block: int) -> Tensor:
    """The slow, obvious form: x [..., K] times the block-diagonal matrix, in x's dtype."""
    matrix = hadamard_matrix(block).to(x)
    return (x.reshape(*x.shape[:-1], x.shape[-1] // block, block) @ matrix).reshape(x.shape)


def rotate(x: Tensor, block: int) -> Tensor:
    """Return the fast Walsh-Hadamard form that every kernel follows, operation for operation.

    Stage by stage, distance 1, 2, 4, ..., block/2, each pair (a, b) becomes (a + b, a - b); then
    every value is multiplied by float32(1 / sqrt(block)). Each step rounds in float32.

    Args:
        x: float32 [..., K], K a multiple of `block`.
        block: a power of two.

    Returns:
        float32 [..., K].
    """
    return _butterflies(x, 1, block) * (1 / math.sqrt(block))


def _butterflies(x: Tensor, distance: int, block: int) -> Tensor:
    """Return x [..., K] after the stages of `distance`, 2 * distance, ... below `block`."""
    shape = x.shape
    while distance < block:
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * distance), 2, distance)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), dim=-2)
        distance *= 2
    return x.reshape(shape)


def hartley_matrix(size: int) -> Tensor:
    """Return the orthonormal Hartley transform: (cos a + sin a) / sqrt(n), a = 2 pi i j / n.

    float64 [size, size]; symmetric, its own inverse. No entry is 0 for an odd size.
    """
    index = torch.arange(size)
    # The product is reduced while it is an integer: large angles lose digits.
    angle = (2 * math.pi / size) * (torch.outer(index, index) % size).to(torch.float64)
    return (angle.cos() + angle.sin()) / math.sqrt(size)


@functools.cache
def odd_factor(size: int, device: torch.device) -> Tensor:
    """Return `hartley_matrix` in float32 on a device, where CUDA graphs may read it again."""
    with torch.inference_mode(False):  # whoever asks first, all may take gradients through it
        return hartley_matrix(size).to(device=device, dtype=torch.float32)


def heads_matrix(heads: int) -> Tensor:
    """Return what mixes `heads` = odd * 2^k heads: Hartley(odd) kron Sylvester(2^k), float64."""
    block = heads & -heads
    return torch.kron(hartley_matrix(heads // block), hadamard_matrix(block))


def mix_heads_by_matrix(x: Tensor, heads: tuple[int, int]) -> Tensor:
    """Return each run of h * d channels times M kron I_d, M = `heads_matrix(h)`: float64, slow."""
    mixing = torch.kron(heads_matrix(heads[0]), torch.eye(heads[1], dtype=torch.float64))
    runs = x.to(torch.float64).reshape(*x.shape[:-1], -1, len(mixing))
    return (runs @ mixing.to(x.device)).reshape(x.shape)


def mix_heads(x: Tensor, heads: tuple[int, int]) -> Tensor:
    """Return the heads of x mixed with one another, channel by channel of a head.

    The power of two goes as in `rotate`, at distances d, 2 d, ... and with its last product; then,
    where h has an odd factor, each run i of 2^k heads becomes

        x_0 * H[0, i] + x_1 * H[1, i] + ...,  H = float32(hartley_matrix(odd)),

    from the left. Every product and every sum rounds in float32 by itself, so that the bits are
    the same on every device; no compiler may contract them (`hadamard.operator`).

    Args:
        x: [..., K], any floating dtype, K a multiple of h * d; each run of so many channels is
            mixed by itself. Of a tensor-parallel rank, its own heads.
        heads: h and d.

    Returns:
        float32 [..., K].
    """
    count, width = heads
    block = count & -count
    z = _butterflies(x.to(torch.float32), width, width * block) * (1 / math.sqrt(block))
    if count == block:
        return z
    groups = x.shape[-1] // (count * width)
    runs = z.reshape(*x.shape[:-1], groups, count // block, block * width)
    mixing = odd_factor(count // block, x.device)
    y = runs[..., :1, :] * mixing[0, :, None]
    for i in range(1, count // block):
        y = y + runs[..., i : i + 1, :] * mixing[i, :, None]
    return y.reshape(x.shape)

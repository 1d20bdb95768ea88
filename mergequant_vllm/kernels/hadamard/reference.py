"""Definition of the online block-diagonal Hadamard rotation (R4; method: rotation).

Each run of `block` channels is multiplied by the orthonormal Sylvester matrix H / sqrt(block),
H[i, j] = (-1)^popcount(i & j). Block-diagonal, so that a tensor-parallel shard of whole blocks
rotates by itself.
"""

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
    """The fast Walsh-Hadamard form that every kernel follows, operation for operation.

    Stage by stage, distance 1, 2, 4, ..., block/2, each pair (a, b) becomes (a + b, a - b); then
    every value is multiplied by float32(1 / sqrt(block)). Each step rounds in float32.

    Args:
        x: float32 [..., K], K a multiple of `block`.
        block: a power of two.

    Returns:
        float32 [..., K].
    """
    shape = x.shape
    distance = 1
    while distance < block:
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * distance), 2, distance)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), dim=-2)
        distance *= 2
    return x.reshape(shape) * (1 / math.sqrt(block))

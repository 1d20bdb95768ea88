"""The butterfly of `reference.rotate` as a Triton function, for the quantizer that runs behind it.

What a stage costs is whether both values of each pair lie in one thread. A thread loads a run of 8
channels, so the stages of distance 1, 2 and 4 run on the row as it was loaded. One movement through
shared memory brings the other distances of a block into threads, and one brings the row back.

See `triton_mode` for who may import this module.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def butterfly(x: tl.tensor, STAGES: tl.constexpr, OTHERS: tl.constexpr) -> tl.tensor:
    """Run every stage along the first dimension of `x` float32 [2^STAGES, OTHERS].

    A stage pairs neighbours, that is the lowest bit of the first dimension, and puts this bit back
    as the highest. So the distance doubles from stage to stage, and after the last one every bit is
    in its place again.
    """
    POINTS: tl.constexpr = 2**STAGES
    for _ in tl.static_range(0, STAGES):
        pairs = tl.permute(tl.reshape(x, (POINTS // 2, 2, OTHERS)), (0, 2, 1))
        a, b = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (2, 0, 1)), (POINTS, OTHERS))
    return x


@triton.jit
def rotate_row(
    z: tl.tensor, COLUMNS: tl.constexpr, STAGES: tl.constexpr, ROOT: tl.constexpr
) -> tl.tensor:
    """Return `rotate` of one row.

    Args:
        z: float32 [COLUMNS], whole blocks.
        COLUMNS: a power of two.
        STAGES: log2 of the block.
        ROOT: 1 / sqrt(block).

    Returns:
        float32 [COLUMNS].
    """
    NEAR_STAGES: tl.constexpr = STAGES if STAGES < 3 else 3
    FAR_STAGES: tl.constexpr = STAGES - NEAR_STAGES
    NEAR: tl.constexpr = 2**NEAR_STAGES
    FAR: tl.constexpr = 2**FAR_STAGES
    BLOCKS: tl.constexpr = COLUMNS // (NEAR * FAR)
    near = tl.permute(tl.reshape(z, (BLOCKS * FAR, NEAR)), (1, 0))
    near = tl.reshape(butterfly(near, NEAR_STAGES, BLOCKS * FAR), (NEAR, BLOCKS, FAR))
    far = tl.reshape(tl.permute(near, (2, 1, 0)), (FAR, BLOCKS * NEAR))
    far = tl.reshape(butterfly(far, FAR_STAGES, BLOCKS * NEAR), (FAR, BLOCKS, NEAR))
    return tl.reshape(tl.permute(far, (1, 0, 2)), (COLUMNS,)) * ROOT

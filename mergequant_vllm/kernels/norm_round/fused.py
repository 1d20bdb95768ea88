"""Static rounding written so that TorchInductor puts it into the norm's own GPU kernel.

Inductor fuses an elementwise operation with a reduction over n channels only where it is n wide
too, and inlines it only while it is short. So results of another width (reconstruction with more
channels, padding, nibbles) are written in slabs n wide, of which the first columns count: a view
whose rows are longer than they look; and all index arithmetic is done once, ahead of time. Equal to
`reference.py`. On CPU the reference itself fuses.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout, pack_nibbles
from mergequant_vllm.rounding import round_to_codes


@dataclass(frozen=True)
class Slab:
    """What one run of n columns reads; tensors [n], None where they would change nothing.

    Attributes:
        channel: int32, the channel of the norm's output.
        offset: float32, added before rounding, in activation steps.
        mask: float32, 0 for columns that must have code 0.
    """

    channel: Tensor | None
    offset: Tensor | None
    mask: Tensor | None


def plan_slabs(
    n: int, layout: CodeLayout, index: Tensor | None, offset: Tensor | None, columns: int
) -> list[Slab]:
    """The slabs of a linear, made once after loading; arguments as `reference.static_codes`.

    Returns:
        slabs of columns 0, n, 2n, ...; `NIBBLES`: the slabs of the low nibbles, then of the high.
    """
    used = n if index is None else index.shape[0]
    width = columns // 2 if layout is CodeLayout.NIBBLES else columns
    return [
        _plan_slab(n, index, offset, first + start, min(used, first + width))
        for first in range(0, columns, width)
        for start in range(0, width, n)
    ]


def _plan_slab(n: int, index: Tensor | None, offset: Tensor | None, start: int, stop: int) -> Slab:
    real = max(0, min(n, stop - start))
    padding = (0, n - real)
    plain = index is None and start == 0 and real == n
    channel = torch.arange(start, start + real) if index is None else index[start : start + real]
    return Slab(
        channel=None if plain else F.pad(channel.to(torch.int32), padding),
        offset=None if offset is None else F.pad(offset[start : start + real], padding),
        mask=None if real == n else F.pad(torch.ones(real, dtype=torch.float32), padding),
    )


def static_codes(
    normed: Tensor, bits: int, layout: CodeLayout, slabs: list[Slab], columns: int
) -> Tensor:
    """Compute `reference.static_codes`; rows of the result may have a stride above `columns`.

    Args:
        normed: [..., n], the norm's output.
        slabs: of `plan_slabs`.
    """
    codes = [_slab_codes(normed, bits, slab) for slab in slabs]
    if layout is CodeLayout.NIBBLES:
        half = len(codes) // 2
        pairs = zip(codes[:half], codes[half:], strict=True)
        packed = [pack_nibbles(low, high) for low, high in pairs]
        return _joined(packed)[..., : columns // 2]
    dtype = torch.float32 if layout is CodeLayout.FLOAT32 else torch.int8
    return _joined(codes)[..., :columns].to(dtype)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _slab_codes(normed: Tensor, bits: int, slab: Slab) -> Tensor:
    x = normed.to(torch.float32)
    if slab.channel is not None:
        x = x.index_select(-1, slab.channel)
    if slab.offset is not None:
        x = x + slab.offset
    if slab.mask is not None:
        x = x * slab.mask
    return round_to_codes(x, bits).to(torch.int8)

"""How activation codes travel from a quantizer to a product.

| layout    | tensor                  | what it holds                                             |
|-----------|-------------------------|-----------------------------------------------------------|
| `FLOAT32` | float32 [..., columns]  | integer values                                            |
| `INT8`    | int8 [..., columns]     | the codes                                                 |
| `NIBBLES` | uint8 [..., columns/2]  | two's complement: byte j has column j in its low nibble,  |
|           |                         | column columns/2 + j in its high nibble                   |

`columns` is the K that the product's kernel works on; codes beyond the linear's own K are 0. Rows
may be longer than they look (a row stride above `columns`): the last dimension alone is contiguous.

Nibbles of halves, not of neighbours: a compiler fuses two contiguous halves with the reduction in
front of them, and neighbours not. The weight's columns are put into the same order once.
"""

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor


class CodeLayout(Enum):
    """See the module's table."""

    FLOAT32 = "float32"
    INT8 = "int8"
    NIBBLES = "nibbles"


class CodeWriter(Enum):
    """Whose code writes the codes that a kernel takes, see `quantizers`."""

    REFERENCE = "reference"
    GPU = "gpu"
    NATIVE = "native"


def lay_out(codes: Tensor, layout: CodeLayout, columns: int) -> Tensor:
    """Integer-valued `codes` [..., K], any dtype, in `layout` with K padded to `columns`."""
    if columns != codes.shape[-1]:
        codes = F.pad(codes, (0, columns - codes.shape[-1]))
    if layout is CodeLayout.FLOAT32:
        return codes.to(torch.float32)
    narrow = codes.to(torch.int8)
    if layout is CodeLayout.INT8:
        return narrow
    return pack_nibbles(narrow[..., : columns // 2], narrow[..., columns // 2 :])


def as_rows(codes: Tensor, alignment: int = 16) -> Tensor:
    """Codes [..., columns] as [M, columns] for a kernel, copied only where they must be.

    Args:
        alignment: bytes; a row must begin at a multiple of it for loads of that width.
    """
    # `reshape` takes microseconds even where it changes nothing.
    rows = codes if codes.dim() == 2 else codes.reshape(-1, codes.shape[-1])
    starts = (rows.storage_offset(), rows.stride(0))
    aligned = all(start * rows.element_size() % alignment == 0 for start in starts)
    return rows if rows.stride(1) == 1 and aligned else rows.contiguous()


def pack_nibbles(low: Tensor, high: Tensor) -> Tensor:
    """Two int8 tensors of 4-bit codes in one uint8 tensor of their shape."""
    return ((low & 15) | (high << 4)).view(torch.uint8)


def nibble_order(columns: int) -> Tensor:
    """int64 [columns]: the column of `NIBBLES` that each nibble holds, byte by byte, low first."""
    return torch.arange(columns).reshape(2, -1).T.reshape(-1)


def read_codes(laid_out: Tensor, layout: CodeLayout) -> Tensor:
    """The inverse of `lay_out`, padding kept: int8 [..., columns]."""
    if layout is not CodeLayout.NIBBLES:
        return laid_out.to(torch.int8)
    signed = laid_out.view(torch.int8)
    low, high = (signed << 4) >> 4, signed >> 4
    return torch.cat((low, high), dim=-1)

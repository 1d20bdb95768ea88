"""The static path's rounding as one Triton kernel, see `program`.

Results equal `reference.py` bit for bit, but for the sign of zeros in `FLOAT32`. A NaN is NaN in
`FLOAT32` and code 0 in `INT8` and `NIBBLES`, where the definition leaves it to the machine's
conversion. Entries of the index are not checked.
"""

from typing import Any

import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.torch_operator import define_operator
from mergequant_vllm.rounding import largest_code, smallest_code

# Columns of a tile.
TILE_COLUMNS = 1024
# Tokens of a tile where there are many: they share what is read of the index and the offset.
TILE_ROWS = 4
MANY_TOKENS = 512


def rows_of(x: Tensor) -> Tensor:
    """`x` [..., K] as [tokens, K] whose rows are contiguous; copied only if it has to be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def parts_of(layout: str) -> int:
    """How many columns share a place in the `CodeLayout` of this value."""
    return 2 if layout == CodeLayout.NIBBLES.value else 1


def empty_codes(x: Tensor, K: int, layout: str, columns: int) -> Tensor:
    """Room for codes [..., columns] of `x` [..., n] in the `CodeLayout` of this value."""
    parts = parts_of(layout)
    if columns < K or columns % parts:
        raise ValueError(f"{columns} columns do not hold {K} codes as {layout}, {parts} a place.")
    dtype = torch.uint8 if parts == 2 else getattr(torch, layout)
    return x.new_empty((*x.shape[:-1], columns // parts), dtype=dtype)


def launch_constants(tokens: int, bits: int, layout: str, columns: int) -> dict[str, Any]:
    """What the kernel is compiled for: its own constants, then Triton's options."""
    parts = parts_of(layout)
    return {
        "ROWS": TILE_ROWS if tokens >= MANY_TOKENS else 1,
        "PARTS": parts,
        "WIDTH": min(TILE_COLUMNS, power_of_two(columns)) // parts,
        "SMALLEST": smallest_code(bits),
        "LARGEST": largest_code(bits),
        "num_warps": 4,
        # The references round after every product and every sum.
        "enable_fp_fusion": False,
    }


def power_of_two(least: int) -> int:
    """The smallest one that is not less than `least`."""
    return 1 << (least - 1).bit_length()


def _columns_before_padding(normed: Tensor, index: Tensor | None) -> int:
    return normed.shape[-1] if index is None else index.shape[0]


def _launch(
    normed: Tensor,
    bits: int,
    layout: str,
    index: Tensor | None,
    offset: Tensor | None,
    columns: int,
) -> Tensor:
    from mergequant_vllm.kernels.norm_round.program import static_codes_program

    codes = _result_shape(normed, bits, layout, index, offset, columns)
    x = rows_of(normed)
    tokens = x.shape[0]
    K = _columns_before_padding(normed, index)
    constants = launch_constants(tokens, bits, layout, columns)
    grid = (-(-tokens // constants["ROWS"]), -(-codes.shape[-1] // constants["WIDTH"]))
    static_codes_program[grid](
        x, index, offset, codes, tokens, x.stride(0), K, columns, **constants
    )
    return codes


def _result_shape(
    normed: Tensor,
    bits: int,
    layout: str,
    index: Tensor | None,
    offset: Tensor | None,
    columns: int,
) -> Tensor:
    return empty_codes(normed, _columns_before_padding(normed, index), layout, columns)


static_codes_triton = define_operator("static_codes_triton", _launch, _result_shape)


def static_codes(
    normed: Tensor,
    bits: int,
    layout: CodeLayout,
    *,
    index: Tensor | None = None,
    offset: Tensor | None = None,
    columns: int | None = None,
) -> Tensor:
    """Compute `reference.static_codes`, bit for bit; opaque to torch.compile."""
    columns = columns or _columns_before_padding(normed, index)
    codes: Tensor = static_codes_triton(normed, bits, layout.value, index, offset, columns)
    return codes

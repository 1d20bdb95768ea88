"""The Triton program of the INT4 linear: int8 tensor cores, weights packed until registers.

The product is computed transposed, weights [BLOCK_N, .] times codes [., BLOCK_M]: the tensor cores
of capability 9.0 and later read only their first operand from registers, where weights unpack.

A code of b bits is unpacked into the top b bits of an int8, which is the code times 2^(8-b): a
shift and a mask, without sign extension. The sums are shifted back, exactly.

See `triton_mode` for who may import this module.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def centred(
    products: tl.tensor,
    zero_points: tl.tensor | None,
    code_sums: tl.tensor | None,
    weight_sums: tl.tensor | None,
    token_zero: tl.tensor | None,
    span: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
) -> tl.tensor:
    """Return a span's sums of codes times weights, both less their zero points.

    Args:
        products: int32 [BLOCK_N, BLOCK_M], sums of codes times weight codes.
        span: number of the span.
        rows: the tile's tokens.
        outputs: the tile's outputs; the others are as the program has them.
    """
    if zero_points is not None:
        zero = tl.load(zero_points + span * N + outputs, mask=outputs < N, other=0).to(tl.int32)
        in_span = tl.load(code_sums + span * M + rows, mask=rows < M, other=0)
        products -= zero[:, None] * in_span[None, :]
    if token_zero is not None:
        weights = tl.load(weight_sums + span * N + outputs, mask=outputs < N, other=0)
        zero = tl.load(token_zero + rows, mask=rows < M, other=0)
        products -= weights[:, None] * zero[None, :]
    return products


@triton.jit(do_not_specialize=["M"])
def integer_linear_program(
    codes: tl.tensor,
    weight: tl.tensor,
    weight_step: tl.tensor,
    zero_points: tl.tensor | None,
    code_sums: tl.tensor | None,
    weight_sums: tl.tensor | None,
    ends: tl.tensor | None,
    token_step: tl.tensor | None,
    token_zero: tl.tensor | None,
    constant: tl.tensor | None,
    out: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    columns: tl.tensor,
    row_codes: tl.tensor,
    row_bytes: tl.tensor,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    UNPACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Compute one [BLOCK_M, BLOCK_N] tile of the output.

    Sums of products of int32 run over a span: all inputs, a group or a segment. A segment is a run
    of groups of which `ends` names the last.

    Args:
        codes: int8 [M, columns], `row_codes` apart.
        weight: int8 [N, row_bytes], contiguous, see `layout`.
        weight_step: float32 [spans, N].
        zero_points: int8 [spans, N] or None.
        code_sums: int32 [spans, M], sums of each span's activation codes; None without zero
            points.
        weight_sums: int32 [spans, N], what a token's zero point is multiplied by; None without.
        ends: int32 [groups], the segment that ends with each group, or -1; None: every group is a
            span.
        token_step: float32 [M] or None.
        token_zero: int32 [M] or None.
        constant: float32 [N] or None.
        out: [M, N], contiguous, written in its own dtype.
        M: tokens.
        N: outputs.
        columns: inputs, padded to whole steps.
        row_codes: from one row of codes to the next, at least `columns`.
        row_bytes: bytes of a row of weights.
        BITS: width of a code in `weight`.
        RUN: columns of a part of the layout's tile.
        PARTS: parts of a tile.
        GROUP: inputs of a group; 0: one step per output.
        UNPACK: `unpacking(BITS)`; empty: the plain formulas.
        BLOCK_M: tokens of the tile.
        BLOCK_N: outputs of the tile.
        BLOCK_K: inputs of one step along K, whole tiles of the layout.
    """
    # Bands of eight token tiles take turns at the same weights, which then stay in the L2 cache.
    BAND: tl.constexpr = 8
    tiles_n = (N + BLOCK_N - 1) // BLOCK_N
    band = tl.program_id(0) // (BAND * tiles_n)
    place = tl.program_id(0) % (BAND * tiles_n)
    height = tl.minimum((M + BLOCK_M - 1) // BLOCK_M - band * BAND, BAND)
    rows = (band * BAND + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = (place // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_outputs = rows < M, outputs < N

    # One part of each tile in a step: its codes and its bytes. 64 bits: M * K and N * K pass 2^31.
    PLANES: tl.constexpr = 3 if BITS == 3 else 1
    PART: tl.constexpr = BLOCK_K // PARTS
    tile, within = tl.arange(0, PART) // RUN, tl.arange(0, PART) % RUN
    x_part = codes + rows.to(tl.int64)[:, None] * row_codes
    x_part += (tile * (RUN * PARTS) + within)[None, :]
    w_plane = weight + outputs.to(tl.int64)[:, None] * row_bytes
    w_plane += (tile * (RUN * PLANES) + within)[None, :]

    sums = tl.full((BLOCK_N, BLOCK_M), 0, tl.int32)
    # -0: adding to it leaves the first group as it is, even where that is -0.
    y = tl.full((BLOCK_N, BLOCK_M), 0, tl.float32) * -1.0
    for step in range(columns // BLOCK_K):
        w_at = w_plane + step * (PART * PLANES)
        plane = tl.load(w_at, mask=in_outputs[:, None], other=0)
        if BITS == 3:
            odd_plane = tl.load(w_at + RUN, mask=in_outputs[:, None], other=0)
            signs = tl.load(w_at + 2 * RUN, mask=in_outputs[:, None], other=0)
        for part in tl.static_range(PARTS):
            x_at = x_part + (step * BLOCK_K + part * RUN)
            x = tl.load(x_at, mask=in_rows[:, None], other=0)
            if BITS == 8:
                w = plane
            elif BITS == 4:
                if len(UNPACK) > 0:
                    w = tl.inline_asm_elementwise(
                        UNPACK[part], "=r,r", [plane], dtype=tl.int8, is_pure=True, pack=4
                    )
                else:
                    w = (plane << 4 if part == 0 else plane & -16).to(tl.int8)
            else:
                low = plane if part % 2 == 0 else odd_plane
                if len(UNPACK) > 0:
                    w = tl.inline_asm_elementwise(
                        UNPACK[part], "=r,r,r", [low, signs], dtype=tl.int8, is_pure=True, pack=4
                    )
                else:
                    up = 5 - part // 2 * 2
                    low = low << up if up > 0 else low >> -up
                    w = ((low & 96) | ((signs << (7 - part)) & -128)).to(tl.int8)
            sums = tl.dot(w, tl.trans(x), sums, out_dtype=tl.int32)
            # A tile of the layout holds whole groups, or a group holds whole steps.
            if GROUP > 0 and (
                (part + 1) * RUN % GROUP == 0 if GROUP < BLOCK_K else part == PARTS - 1
            ):
                after = (step + 1) * BLOCK_K
                group_ends = True if GROUP <= BLOCK_K else (after % GROUP == 0) | (after == columns)
                if group_ends:
                    span = (step * BLOCK_K + part * RUN) // GROUP
                    if ends is not None:
                        span = tl.load(ends + span)
                    span_ends = True if ends is None else span >= 0
                    if span_ends:
                        products = centred(
                            sums >> (8 - BITS),
                            zero_points,
                            code_sums,
                            weight_sums,
                            token_zero,
                            span,
                            rows,
                            outputs,
                            M,
                            N,
                        )
                        at = weight_step + span * N + outputs
                        scale = tl.load(at, mask=in_outputs, other=0)
                        y += products.to(tl.float32) * scale[:, None]
                        sums = tl.full((BLOCK_N, BLOCK_M), 0, tl.int32)

    if GROUP == 0:
        products = centred(
            sums >> (8 - BITS),
            zero_points,
            code_sums,
            weight_sums,
            token_zero,
            0,
            rows,
            outputs,
            M,
            N,
        )
        y = products.to(tl.float32)
    # The reference's order; `compile_options` keeps it.
    if token_step is not None:
        y = y * tl.load(token_step + rows, mask=in_rows, other=0)[None, :]
    if GROUP == 0:
        y = y * tl.load(weight_step + outputs, mask=in_outputs, other=0)[:, None]
    if constant is not None:
        y = y + tl.load(constant + outputs, mask=in_outputs, other=0)[:, None]
    out_at = out + rows.to(tl.int64)[:, None] * N + outputs[None, :]
    in_out = in_rows[:, None] & in_outputs[None, :]
    tl.store(out_at, tl.trans(y.to(out.dtype.element_ty)), mask=in_out)

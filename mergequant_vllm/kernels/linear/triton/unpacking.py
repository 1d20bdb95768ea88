"""PTX that unpacks weight codes where Triton would go byte by byte."""


def unpacking(bits: int) -> tuple[str, ...]:
    """Return PTX for each part of a tile: four bytes of the planes, $1 and $2, to four codes, $0.

    Triton's interpreter knows no assembly and runs the program's plain formulas, which are these.
    """
    if bits == 4:
        return (
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "and.b32 $0, $1, 0xF0F0F0F0;",
        )
    if bits == 3:
        return tuple(_unpacking_of_3_bits(part) for part in range(8))
    return ()


def _unpacking_of_3_bits(part: int) -> str:
    up = 5 - part // 2 * 2
    low = f"shl.b32 t, $1, {up}" if up > 0 else f"shr.b32 t, $1, {-up}"
    return (
        f"{{ .reg .b32 t, s; {low}; and.b32 t, t, 0x60606060; "
        f"shl.b32 s, $2, {7 - part}; and.b32 s, s, 0x80808080; or.b32 $0, t, s; }}"
    )

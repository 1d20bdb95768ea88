"""The Triton kernel compiles to machine code for GPUs that are not here."""

import re
from typing import Any

import pytest

from mergequant_vllm.kernels.linear.triton.operator import compile_options
from mergequant_vllm.kernels.linear.triton.tiles import (
    LinearShape,
    Tile,
    default_tile,
    shared_limit,
)
from mergequant_vllm.kernels.linear.triton.unpacking import unpacking
from tests.mergequant_vllm.kernels.programs import forget_programs

POINTERS = {
    "codes": "*i8",
    "weight": "*i8",
    "weight_step": "*fp32",
    "zero_points": "*i8",
    "code_sums": "*i32",
    "weight_sums": "*i32",
    "ends": "*i32",
    "token_step": "*fp32",
    "token_zero": "*i32",
    "constant": "*fp32",
    "out": "*bf16",
}

ZEROS = ("zero_points", "code_sums")
TOKEN_ZEROS = ("token_step", "weight_sums", "token_zero")
Variant = tuple[int, int, int, int | tuple[int, ...] | None, tuple[str, ...]]

# Capability, tokens, weight bits, group size or segments, and which optional tensors there are.
# Each width, each kind of span and each tensor-core instruction (mma, wgmma, tcgen05) once.
VARIANTS: list[Variant] = [
    (80, 1, 4, None, ("token_step",)),
    (80, 64, 8, None, ("constant",)),
    (80, 64, 4, (256, 3840), ("ends", "token_step")),
    (90, 1, 3, 128, ZEROS),
    (90, 64, 4, 512, (*ZEROS, "token_step", "constant")),
    (90, 64, 4, (128, 1920, 2048), (*ZEROS, *TOKEN_ZEROS, "ends", "constant")),
    (100, 64, 4, None, ("token_step", "constant")),
    (120, 1, 3, None, TOKEN_ZEROS),
]


def compile_for(capability: int, tile: Tile, shape: LinearShape, optional: tuple[str, ...]) -> Any:
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mergequant_vllm.kernels.linear.triton.program import integer_linear_program as kernel

    layout = shape.layout
    absent = POINTERS.keys() - {"codes", "weight", "weight_step", "out", *optional}
    constants = {
        **dict.fromkeys(absent),
        "BITS": layout.bits,
        "RUN": layout.run,
        "PARTS": layout.parts,
        "GROUP": shape.group or 0,
        "UNPACK": unpacking(layout.bits),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    present = {name: kind for name, kind in POINTERS.items() if name not in absent}
    types = {**present, **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = [*present, "N", "columns", "row_codes", "row_bytes"]
    source = ASTSource(
        kernel,
        signature,
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    return compile_kernel(source, target=target, options=compile_options(tile))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_compiles_for_gpus(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Int8 tensor cores, no fused multiply-add, no flushed subnormals, small enough."""
    pytest.importorskip("triton", reason="Triton is not installed")
    capability, tokens, bits, spans, optional = variant
    form = (None, spans) if isinstance(spans, tuple) else (spans, None)
    shape = LinearShape(4096, 4096, bits, *form)
    limit = shared_limit(capability)
    tile = default_tile(shape, tokens, limit)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget_programs()
    compiled = compile_for(capability, tile, shape, optional)
    forget_programs()
    ptx = compiled.asm["ptx"]
    assert re.search(r"mma.*(\.s8\.s8|kind::i8)", ptx)
    assert "fma." not in ptx and ".ftz" not in ptx
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= limit
    assert not re.search(r"\.local\b", ptx)

"""The Triton quantizers compile for GPUs, without one: registers suffice, nothing is contracted."""

import importlib
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.norm_round import triton as norm_round_triton
from mergequant_vllm.kernels.token_quant import triton as token_quant_triton
from tests.mergequant_vllm.kernels.programs import forget_programs

KERNELS = "mergequant_vllm.kernels"
TOKEN = (f"{KERNELS}.token_quant.program", "token_codes_program")
STATIC = (f"{KERNELS}.norm_round.program", "static_codes_program")
POINTERS = {CodeLayout.FLOAT32: "*fp32", CodeLayout.INT8: "*i8", CodeLayout.NIBBLES: "*u8"}


def assemble(
    program: tuple[str, str],
    capability: int,
    arguments: dict[str, str],
    constants: dict[str, Any],
    folder: Path,
) -> str:
    """PTX of a program, by module and name; ptxas makes it machine code that keeps registers."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    forget_programs()
    kernel = getattr(importlib.import_module(program[0]), program[1])
    forget_programs()
    options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    aligned = [name for name in arguments if name != "tokens"]
    source = ASTSource(
        kernel,
        {name: arguments.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "STACK:0 " in usage and "LOCAL:0 " in usage
    assert compiled.metadata.shared <= 64 * 1024  # a block's most on capability 7.5
    ptx: str = compiled.asm["ptx"]
    # Every operation is rounded by itself, in float32, subnormal numbers too.
    assert not [word for word in ("fma.", ".ftz", ".f64", "div.full", "rcp") if word in ptx]
    return ptx


SIZES_OF_LAUNCH = {"tokens": "i32", "stride": "i32", "K": "i32", "columns": "i32"}


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("hadamard", [None, 128])
@pytest.mark.parametrize(("capability", "K"), [(80, 14336), (90, 4096), (90, 11008)])
def test_token_codes_compile_for_gpus(
    capability: int,
    K: int,
    hadamard: int | None,
    zero_points: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Registers suffice, divisions are IEEE."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pointers = {"x": "*bf16", "clip": "*fp32", "codes": "*u8", "step": "*fp32"}
    constants = token_quant_triton.launch_constants(4, "nibbles", hadamard, K, zero_points)
    if zero_points:
        pointers["zero"] = "*i32"
    else:
        constants["zero"] = None
    arguments = {**pointers, **SIZES_OF_LAUNCH}
    ptx = assemble(TOKEN, capability, arguments, constants, tmp_path)
    assert ptx.count("div.rn.f32") == 1


@pytest.mark.parametrize(
    ("capability", "tokens", "layout", "gathered"),
    [
        (75, 1, CodeLayout.INT8, False),
        (80, 1, CodeLayout.NIBBLES, True),
        (90, 512, CodeLayout.FLOAT32, False),
        (90, 512, CodeLayout.NIBBLES, True),
    ],
)
def test_static_codes_compile_for_gpus(
    capability: int,
    tokens: int,
    layout: CodeLayout,
    gathered: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"normed": "*bf16", "codes": POINTERS[layout], **SIZES_OF_LAUNCH}
    constants = norm_round_triton.launch_constants(tokens, 4, layout.value, 4096)
    if gathered:
        arguments |= {"index": "*i32", "offset": "*fp32"}
    else:
        constants |= {"index": None, "offset": None}
    assemble(STATIC, capability, arguments, constants, tmp_path)

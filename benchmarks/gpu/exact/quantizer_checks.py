"""The quantizers' GPU forms against their definitions, bit for bit: cells of part `exact`.

`triton-...` are the kernels of eager mode; `compiled-...` what torch.compile makes of the forms
that it traces in a server.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.device import Device, runs_triton
from benchmarks.common.random_linears import generator_on
from benchmarks.common.result_cells import Record, Refused
from benchmarks.gpu.exact.error_bounds import first_difference
from mergequant_vllm.kernels.codes import CodeLayout, CodeWriter
from mergequant_vllm.kernels.norm_round import reference as norm_round
from mergequant_vllm.kernels.norm_round import triton as norm_round_triton
from mergequant_vllm.kernels.selection.quantizers import CodeForm, StaticQuantizer, TokenQuantizer
from mergequant_vllm.kernels.token_quant import reference as token_quant
from mergequant_vllm.kernels.token_quant import triton as token_quant_triton

TOKENS = (1, 2, 17, 128, 513)
COLUMNS = (128, 352, 4096, 11008, 28672)
HADAMARD = {128: 128, 352: 32, 4096: 4096, 11008: 256, 28672: 4096}
COMPILED_LAYOUTS = (CodeLayout.INT8, CodeLayout.NIBBLES)
SMOKE = ((2,), (128, 352))


def plan(device: Device, *, smoke: bool) -> dict[str, Callable[[], Record]]:
    """The cells, by key."""
    tokens, columns = SMOKE if smoke else (TOKENS, COLUMNS)
    checks = {"static_codes": check_static, "token_codes": check_tokens}
    works: dict[str, Callable[[], Record]] = {}
    for (name, check), K, bits, layout in itertools.product(
        checks.items(), columns, (4, 8), CodeLayout
    ):
        if bits == 8 and layout is CodeLayout.NIBBLES:
            continue
        others = bits == 8 or layout is not CodeLayout.INT8
        if smoke and others and columns[0] != K:
            continue
        key = f"triton-{name} K={K} {bits} bits {layout.value}"
        works[key] = functools.partial(check, K, bits, layout, tokens, device)
    for K, layout in itertools.product(columns[:1] if smoke else (4096, 11008), COMPILED_LAYOUTS):
        key = f"compiled-quantizers K={K} 4 bits {layout.value}"
        works[key] = functools.partial(check_compiled, K, layout, tokens, device)
    return works


def check_compiled(K: int, layout: CodeLayout, tokens: tuple[int, ...], device: Device) -> Record:
    """The server's own quantizers under torch.compile, which is only traced on CPUs."""
    _refuse(device)
    there, generator = torch.device(device.kind), generator_on(device, K)
    index = torch.randint(K, (K,), generator=generator, device=there, dtype=torch.int32)
    offset = torch.rand(K, generator=generator, device=there) - 0.5
    clip = torch.tensor([0.8], device=there)
    form = CodeForm(bits=4, layout=layout, columns=K, writer=CodeWriter.GPU)
    pairs: dict[str, tuple[nn.Module, Callable[[Tensor], Any]]] = {
        "static": (
            StaticQuantizer(form, K, None, None, there),
            lambda x: (norm_round.static_codes(x, 4, layout), None, None),
        ),
        "static, gather, offset": (
            StaticQuantizer(form, K, index, offset, there),
            lambda x: (
                norm_round.static_codes(x, 4, layout, index=index, offset=offset),
                None,
                None,
            ),
        ),
        "dynamic": (
            TokenQuantizer(form, clip, None),
            lambda x: token_quant.token_codes(x.cpu(), clip.cpu(), 4, layout),
        ),
    }
    differences = []
    for name, (quantizer, definition) in pairs.items():
        compiled = torch.compile(quantizer, backend="inductor" if device.is_gpu else "eager")
        for count in tokens:
            x = inputs(count, K, torch.bfloat16, generator)
            if count > 1:
                torch._dynamo.mark_dynamic(x, 0)
            for result, expected in zip(compiled(x), definition(x), strict=True):
                if result is not None:
                    what = (
                        f"{count} tokens, {name}, {'steps' if result.shape[-1] == 1 else 'codes'}"
                    )
                    differences.append(_compare(what, result.cpu(), expected.cpu()))
    return _record(differences)


def check_static(
    K: int, bits: int, layout: CodeLayout, tokens: tuple[int, ...], device: Device
) -> Record:
    """Rounding with and without gather, offset and padding, in three dtypes."""
    _refuse(device)
    generator = generator_on(device, K)
    index = torch.randint(K, (K,), generator=generator, device=device.kind, dtype=torch.int32)
    offset = torch.rand(K, generator=generator, device=device.kind) - 0.5
    differences = []
    for count, dtype, gather, shift in itertools.product(tokens, _DTYPES, (False, True), (0, 1)):
        x = inputs(count, K, dtype, generator)
        arguments: dict[str, Any] = {
            "index": index if gather else None,
            "offset": offset if shift else None,
            "columns": K + 32 * shift,
        }
        result = norm_round_triton.static_codes(x, bits, layout, **arguments)
        expected = norm_round.static_codes(x, bits, layout, **arguments)
        differences.append(_compare(f"{count} tokens {dtype} {gather=} {shift=}", result, expected))
    return _record(differences)


def check_tokens(
    K: int, bits: int, layout: CodeLayout, tokens: tuple[int, ...], device: Device
) -> Record:
    """Codes, steps and zero points per token, with and without the rotation."""
    _refuse(device)
    generator = generator_on(device, K)
    differences = []
    for count, dtype, hadamard, zero_points in itertools.product(
        tokens, _DTYPES, (None, HADAMARD[K]), (False, True)
    ):
        x = inputs(count, K, dtype, generator)
        clip = torch.tensor([0.8])
        form = {"hadamard": hadamard, "columns": K + 32, "zero_points": zero_points}
        results = token_quant_triton.token_codes(x, clip.to(x.device), bits, layout, **form)
        # The definition on a CPU: a GPU's division may round otherwise.
        expected = token_quant.token_codes(x.cpu(), clip, bits, layout, **form)
        what = f"{count} tokens {dtype} {hadamard=} {zero_points=}"
        names = ("codes", "steps", "zeros")
        for name, result, wanted in zip(names, results, expected, strict=True):
            if result is not None and wanted is not None:
                differences.append(_compare(f"{what} {name}", result.cpu(), wanted))
    return _record(differences)


_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def inputs(tokens: int, K: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[tokens, K] of about +-10 steps; every fifth lies halfway between two codes, token 0 is 0."""
    x = torch.randn(tokens, K, generator=generator, device=generator.device) * 4
    x[:, ::5] = x[:, ::5].floor() + 0.5
    x[0, : K // 2] = 0
    return x.to(dtype)


def _refuse(device: Device) -> None:
    if not runs_triton(device):
        raise Refused("it runs on GPUs, or with TRITON_INTERPRET=1")


def _compare(what: str, result: Tensor, expected: Tensor) -> str | None:
    fault = first_difference(result, expected)
    return None if fault is None else f"{what}: {fault}"


def _record(differences: list[str | None]) -> Record:
    faults = [fault for fault in differences if fault is not None]
    first = faults[0] if faults else None
    return {"checks": len(differences), "differing": len(faults), "first": first}

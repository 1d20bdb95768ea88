"""Counts the GPU kernels that Inductor generates around our linears; prints them as JSON.

python -m tests.mergequant_vllm.kernels.fused_cases
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.ir.ops import layernorm
from vllm.model_executor.layers.activation import SiluAndMul

from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.norm_round import fused as norm_round_fused
from mergequant_vllm.kernels.norm_round import reference as norm_round
from mergequant_vllm.kernels.token_quant import fused as token_quant_fused
from tests.mergequant_vllm.kernels.cuda_codegen import Spec, cuda_kernels

HIDDEN, INTERMEDIATE = 4096, 11008  # Llama-2-7B
BF16 = torch.bfloat16
NORM: list[Spec] = [(BF16, (None, HIDDEN)), (BF16, (None, HIDDEN)), (BF16, (HIDDEN,))]

Case = tuple[Callable[..., Any], list[Spec]]


@torch.library.custom_op("mergequant_test::product", mutates_args=())
def product(codes: Tensor, step: Tensor | None) -> Tensor:
    """Stands for the integer product, which no compiler looks into."""
    return codes.to(BF16)


@product.register_fake
def _(codes: Tensor, step: Tensor | None) -> Tensor:
    return codes.new_empty(codes.shape, dtype=BF16)


def norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's own, as its compiled mode traces it."""
    y, added = layernorm.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, 1e-5)
    return y, added


def static_case(
    layout: CodeLayout, k: int = HIDDEN, columns: int | None = None, *, reconstructed: bool = False
) -> Case:
    """Norm and static codes of `columns` columns, with or without index and offset."""
    index = torch.zeros(k, dtype=torch.int32) if reconstructed else None
    offset = torch.zeros(k) if reconstructed else None
    columns = columns or k
    slabs = norm_round_fused.plan_slabs(HIDDEN, layout, index, offset, columns)
    tensors = [t for slab in slabs for t in vars(slab).values()]
    specs: list[Spec] = [(t.dtype, tuple(t.shape)) for t in tensors if t is not None]

    def fn(x: Tensor, residual: Tensor, weight: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        rest = iter(given)
        filled = [None if t is None else next(rest) for t in tensors]
        again = [norm_round_fused.Slab(*filled[i : i + 3]) for i in range(0, len(filled), 3)]
        y, added = norm(x, residual, weight)
        codes = norm_round_fused.static_codes(y, 4, layout, again, columns)
        return product(codes, None), added

    return fn, NORM + specs


def padded_by_reference(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the form for compilers is for."""
    y, added = norm(x, residual, weight)
    return product(norm_round.static_codes(y, 4, CodeLayout.INT8, columns=4352), None), added


def token_case(layout: CodeLayout, activation: bool) -> Case:
    """Per-token codes of attention's output, or of act-and-mul's."""

    def fn(x: Tensor, clip: Tensor) -> Tensor:
        y = SiluAndMul.forward_native(x) if activation else x
        codes, step, _ = token_quant_fused.token_codes(y, clip, 4, layout)
        result: Tensor = product(codes, step)
        return result

    width = 2 * INTERMEDIATE if activation else HIDDEN
    return fn, [(BF16, (None, width)), (torch.float32, (1,))]


def cases() -> dict[str, Case]:
    """What is counted, by name."""
    by_name: dict[str, Case] = {"norm alone": (norm, NORM)}
    for layout in (CodeLayout.INT8, CodeLayout.NIBBLES):
        name = layout.value
        by_name[f"static {name}"] = static_case(layout)
        by_name[f"static {name}, K = n"] = static_case(layout, reconstructed=True)
        by_name[f"static {name}, K = 4352"] = static_case(layout, 4352, reconstructed=True)
        by_name[f"static {name}, K = 4300 of 4352"] = static_case(
            layout, 4300, 4352, reconstructed=True
        )
        by_name[f"token {name} after attention"] = token_case(layout, activation=False)
        by_name[f"token {name} after act-and-mul"] = token_case(layout, activation=True)
    by_name["static, padded, by the reference"] = (padded_by_reference, NORM)
    return by_name


def main() -> None:
    counts = {}
    for name, (fn, specs) in cases().items():
        counts[name] = max(
            sum("triton_heuristics" in kernel for kernel in cuda_kernels(fn, *specs, tokens=tokens))
            # Inductor splits long reductions of few rows.
            for tokens in ((16, 4096) if name.startswith("token") else (16,))
        )
    print(json.dumps(counts))


if __name__ == "__main__":
    main()

"""A decoder block compiled for the CPU: between vLLM's norm and the integer product stands nothing.

Inductor fuses on CPUs by the same rules as on GPUs but for widths. The products are opaque to it
here, as they are on GPUs: the Triton kernel, interpreted.
"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from mergequant_vllm.format import LinearFormat
from tests.forms import linear_form

pytest.importorskip("vllm")
pytest.importorskip("triton", reason="Triton is not installed")

from torch._inductor.utils import run_and_get_code
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.ir.ops import layernorm
from vllm.model_executor.layers.activation import SiluAndMul

from mergequant_vllm.kernels.codes import CodeWriter
from mergequant_vllm.kernels.selection.linears import LINEAR_KERNELS
from mergequant_vllm.kernels.selection.quantizers import CodeForm, StaticQuantizer, TokenQuantizer
from tests.mergequant_vllm.kernels.made import make_linear, make_spec

TOKENS, HIDDEN, INTERMEDIATE = 8, 64, 96


class Linear(torch.nn.Module):
    """A linear as `MergeQuantLinearMethod.apply` runs it."""

    def __init__(self, form: LinearFormat) -> None:
        super().__init__()
        out, columns = form.shape[0], form.in_features
        spec = make_spec(in_features=columns, out_features=out, dynamic=form.norm is None)
        self.product = LINEAR_KERNELS["triton"].prepare(make_linear(spec).stored, spec)
        code_form = CodeForm(
            4, LINEAR_KERNELS["triton"].layout, self.product.columns, writer=CodeWriter.REFERENCE
        )
        if form.norm is None:
            self.quantizer: Any = TokenQuantizer(code_form, torch.tensor([0.9]), None)
            return
        index = torch.arange(columns, dtype=torch.int32).flip(0) % form.shape[1]
        offset = torch.rand(columns) - 0.5
        device = torch.device("cpu")
        self.quantizer = StaticQuantizer(code_form, form.shape[1], index, offset, device)

    def forward(self, x: Tensor) -> Tensor:
        codes, step, zero = self.quantizer(x)
        y: Tensor = self.product(codes, step, zero, False)
        return y


class Block(torch.nn.Module):
    """One decoder block without attention, whose output stands for it."""

    def __init__(self, quantized: bool) -> None:
        super().__init__()
        sizes = {"qkv": (HIDDEN, HIDDEN), "o": (HIDDEN, HIDDEN)}
        sizes |= {"gate_up": (2 * INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
        for name, shape in sizes.items():
            static = name in ("qkv", "gate_up")
            form = linear_form(shape, "dynamic")
            if static:
                form = linear_form(shape, "static", columns=shape[1], offsets=True)
            plain = torch.nn.Linear(shape[1], shape[0], bias=False)
            setattr(self, name, Linear(form) if quantized else plain)
        self.gains = torch.nn.Parameter(torch.rand(2, HIDDEN) + 1, requires_grad=False)

    def norm(self, x: Tensor, residual: Tensor, number: int) -> tuple[Tensor, Tensor]:
        native = layernorm.fused_add_rms_norm.impls["native"].impl_fn
        y, added = native(x, residual, self.gains[number], 1e-5)
        return y, added

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, residual = self.norm(x, residual, 0)
        y = self.o(self.qkv(y))
        y, residual = self.norm(y, residual, 1)
        return self.down(SiluAndMul.forward_native(self.gate_up(y))), residual


def generated_kernels(block: Block) -> list[str]:
    """Source of each kernel that Inductor generates for `block`, as the wrapper names them."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(2))
    with set_current_vllm_config(VllmConfig()), torch.no_grad():
        eager = block(x, residual)
        torch.compiler.reset()
        compiled = torch.compile(block, fullgraph=True)
        outputs, sources = run_and_get_code(compiled, x, residual)
    for mine, theirs in zip(outputs, eager, strict=True):
        # A code may fall on the other side of a tie where the compiler keeps more bits.
        assert float((mine - theirs).norm() / theirs.norm()) < 0.05
    return re.findall(r"^(cpp_fused\w*) = async_compile", "\n".join(sources), re.M)


def test_no_kernel_stands_between_norm_and_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    plain = generated_kernels(Block(quantized=False))
    quantized = generated_kernels(Block(quantized=True))
    # norm, norm, act-and-mul: with the rounding inside, and one more in front of o.
    assert len(plain) == 3
    assert len(quantized) == 4
    rounding = [name for name in quantized if "round" in name or "nearbyint" in name]
    assert len(rounding) == 4, quantized

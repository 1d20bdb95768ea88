"""Norm and rounding fused by the compiler: codes differ from eager by 1 at most, and only where the
unrounded value lies next to a tie."""

import pytest
import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.norm_round.reference import static_codes


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as vLLM's native form computes it."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return (wide.to(weight.dtype) * weight).to(x.dtype)


def norm_and_round(x: Tensor, weight: Tensor) -> Tensor:
    return static_codes(norm(x, weight), 4, CodeLayout.FLOAT32)


# What fusion may leave out between the norm's float32 value and the code: two roundings to the
# model's dtype, before and after the product. The rest is float32's own: the order of the mean's
# 512 terms, the reciprocal root, three products, on both sides; 16 units cover them.
@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_codes_differ_only_at_near_ties(dtype: torch.dtype, unit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 512, generator=generator).to(dtype)
    weight = (1 + 3 * torch.rand(512, generator=generator)).to(torch.bfloat16).to(dtype)
    eager = norm_and_round(x, weight)
    compiled = torch.compile(norm_and_round, fullgraph=True)(x, weight)
    different = eager != compiled
    assert float((eager - compiled).abs().max()) <= 1
    exact = (
        norm(x.double(), weight.double()) if dtype == torch.float32 else _float32_norm(x, weight)
    )
    to_tie = ((exact - exact.floor()) - 0.5).abs()
    near = to_tie <= (2 * unit + 16 * 2**-24) * exact.abs()
    assert bool(near[different].all())
    assert int(different.sum()) <= int(near.sum()) < 0.1 * near.numel()


def _float32_norm(x: Tensor, weight: Tensor) -> Tensor:
    return norm(x.float(), weight.float())

"""CPU kernels against the definition in 64-bit integers: equal, to the last bit."""

import pytest
import torch
from torch import Tensor

from mergequant_vllm.kernels.int4_linear.cpu import CpuLinear
from mergequant_vllm.kernels.int4_linear.reference import (
    ReferenceLinear,
    integer_products,
    scale_products,
)
from mergequant_vllm.kernels.int4_linear.spec import LinearKernel, LinearSpec
from mergequant_vllm.packing import pack

KERNELS: list[LinearKernel] = [CpuLinear(), ReferenceLinear()]
SIZES = [(1, 1, 1), (2, 7, 43), (7, 129, 127), (64, 128, 128), (128, 43, 352), (129, 64, 4099)]


def spec(in_features: int, out_features: int, **changes: object) -> LinearSpec:
    fields: dict[str, object] = {
        "in_features": in_features,
        "out_features": out_features,
        "weight_bits": 4,
        "activation_bits": 4,
        "dynamic": False,
        "device": "cpu",
        "dtype": torch.float32,
    }
    return LinearSpec(**{**fields, **changes})  # type: ignore[arg-type]


def codes(kind: str, rows: int, columns: int) -> Tensor:
    if kind == "random":
        generator = torch.Generator().manual_seed(rows * columns)
        return torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    return torch.full((rows, columns), {"lowest": -8, "highest": 7}[kind], dtype=torch.int8)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("kind", ["random", "lowest", "highest"])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_integer_sums_are_exact(kernel: LinearKernel, kind: str, m: int, n: int, k: int) -> None:
    x, w = codes(kind, m, k), codes(kind, n, k)
    weight = kernel.prepare(pack(w, 4), spec(k, n))
    ones = torch.ones(n)
    y = kernel.linear(x.to(kernel.code_dtype), weight, ones, None, None, torch.float64)
    assert torch.equal(y.to(torch.int64), integer_products(x, w))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_token_step", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_epilogue_is_the_references(
    out_dtype: torch.dtype, with_token_step: bool, with_bias: bool
) -> None:
    m, n, k = 7, 43, 127
    x, w = codes("random", m, k), codes("random", n, k)
    generator = torch.Generator().manual_seed(0)
    weight_step = torch.rand(n, generator=generator) * 1e-3
    token_step = torch.rand(m, 1, generator=generator) if with_token_step else None
    bias = torch.randn(n, generator=generator).to(out_dtype) if with_bias else None
    expected = scale_products(integer_products(x, w), weight_step, token_step, bias, out_dtype)
    for kernel in KERNELS:
        weight = kernel.prepare(pack(w, 4), spec(k, n))
        y = kernel.linear(x.to(kernel.code_dtype), weight, weight_step, token_step, bias, out_dtype)
        assert y.dtype == out_dtype
        assert torch.equal(y, expected)


def test_leading_dimensions_are_kept() -> None:
    x, w = codes("random", 6, 16), codes("random", 5, 16)
    kernel = CpuLinear()
    weight = kernel.prepare(pack(w, 4), spec(16, 5))
    y = kernel.linear(
        x.reshape(2, 3, 16).to(torch.float32), weight, torch.ones(5), None, None, torch.float32
    )
    assert y.shape == (2, 3, 5)


def test_float32_is_refused_where_its_sums_could_round() -> None:
    kernel = CpuLinear()
    assert kernel.refusal(spec(262144, 8)) is None
    refusal = kernel.refusal(spec(262145, 8))
    assert refusal is not None and "262144" in refusal
    assert kernel.refusal(spec(8, 8, device="cuda")) is not None

"""Linears made for tests: codes, steps, zero points, in the stored layout and spelled out."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import lay_out
from mergequant_vllm.kernels.linear.reference import ReferenceLinear
from mergequant_vllm.kernels.linear.spec import LinearKernel, LinearSpec, StoredLinear
from mergequant_vllm.packing import pack

BASE = LinearSpec(
    in_features=352,
    out_features=128,
    weight_bits=4,
    activation_bits=4,
    dynamic=False,
    device="cpu",
    dtype=torch.float32,
)
# Fields of a linear that kernels of GPUs serve.
GPU: dict[str, object] = {"device": "cuda", "dtype": torch.bfloat16, "capability": 90}


def make_spec(**changes: object) -> LinearSpec:
    """`BASE` with other fields."""
    return replace(BASE, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class MadeLinear:
    """What a test knows of a linear: `codes` int8 [N, K] beside the stored form."""

    spec: LinearSpec
    codes: Tensor
    stored: StoredLinear


def random_codes(bits: int, *shape: int, seed: int = 0) -> Tensor:
    """int8, uniform over the whole range of `bits`."""
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)


def make_linear(
    spec: LinearSpec,
    *,
    codes: Tensor | None = None,
    zero_points: Tensor | None = None,
    bias: bool = False,
    offset: bool = False,
    seed: int = 0,
) -> MadeLinear:
    """A linear of random codes (or `codes`) whose steps are exact in bfloat16 and float16."""
    n, k = spec.out_features, spec.in_features
    generator = torch.Generator().manual_seed(seed + 1)
    if codes is None:
        codes = random_codes(spec.weight_bits, n, k, seed=seed)
    if spec.zero_points and zero_points is None:
        zero_points = random_codes(spec.weight_bits, n, spec.groups, seed=seed + 2)
    # 1.0 .. 1.99 in 7 bits of mantissa, times a power of two.
    step = (128 + torch.randint(0, 128, (n, spec.groups), generator=generator)) * 2.0**-15
    added = torch.randn(n, generator=generator).to(spec.dtype) if bias else None
    shift = torch.randn(n, generator=generator) if offset else None
    stored = StoredLinear(pack(codes, spec.weight_bits), step, zero_points, added, shift)
    return MadeLinear(spec, codes, stored)


def make_on_gpu(n: int, k: int, *, bias: bool = False, **changes: object) -> MadeLinear:
    """A linear [n, k] as `GPU` has it, with other fields."""
    spec = make_spec(in_features=k, out_features=n, **{**GPU, **changes})
    return make_linear(spec, bias=bias, seed=n + k)


def make_token_step(tokens: int, seed: int = 0) -> Tensor:
    """float32 [tokens, 1]."""
    return torch.rand(tokens, 1, generator=torch.Generator().manual_seed(seed)) + 0.01


def make_token_zero(bits: int, tokens: int, seed: int = 0) -> Tensor:
    """int32 [tokens, 1], in the range of codes of `bits`."""
    return random_codes(bits, tokens, 1, seed=seed).to(torch.int32)


def make_inputs(
    spec: LinearSpec, tokens: int, seed: int = 0
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Codes [tokens, K] by `seed`; steps and zero points of the tokens, where `spec` has them."""
    x = random_codes(spec.activation_bits, tokens, spec.in_features, seed=seed)
    step = make_token_step(tokens) if spec.dynamic else None
    zero = make_token_zero(spec.activation_bits, tokens) if spec.token_zero_points else None
    return x, step, zero


def expected(
    made: MadeLinear,
    x: Tensor,
    step: Tensor | None,
    bias: bool = False,
    zero: Tensor | None = None,
) -> Tensor:
    """The reference's output for codes `x` [..., K]."""
    y: Tensor = ReferenceLinear().prepare(made.stored, made.spec)(x, step, zero, bias)
    return y


def run(
    kernel: LinearKernel,
    made: MadeLinear,
    x: Tensor,
    step: Tensor | None,
    bias: bool = False,
    zero: Tensor | None = None,
) -> Tensor:
    """The kernel's output for codes `x` [..., K], which it gets in its own layout."""
    prepared = kernel.prepare(made.stored, made.spec)
    y: Tensor = prepared(lay_out(x, kernel.layout, prepared.columns), step, zero, bias)
    assert y.dtype == made.spec.dtype and y.is_contiguous()
    return y


def half_ulp(dtype: torch.dtype, values: Tensor) -> Tensor:
    """The most that rounding `values` to `dtype` changes them."""
    information = torch.finfo(dtype)
    return information.eps / 2 * values.abs() + information.tiny * information.eps / 2

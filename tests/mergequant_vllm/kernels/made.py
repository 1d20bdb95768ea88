"""Linears made for tests: codes, steps, zero points, in the stored layout and spelled out."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergequant_vllm.kernels.int4_linear.spec import LinearSpec, StoredLinear
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
    stored = StoredLinear(pack(codes, spec.weight_bits), step, zero_points, added)
    return MadeLinear(spec, codes, stored)


def make_token_step(tokens: int, seed: int = 0) -> Tensor:
    """float32 [tokens, 1]."""
    return torch.rand(tokens, 1, generator=torch.Generator().manual_seed(seed)) + 0.01

"""Random quantized linears and activations, made on the device that will run them."""

import torch
from torch import Tensor

from benchmarks.common.device import Device
from mergequant_vllm.kernels.codes import CodeLayout, lay_out
from mergequant_vllm.kernels.linear.spec import LinearSpec, StoredLinear
from mergequant_vllm.packing import pack, words_per_row

# `random`; all codes the smallest, which gives the largest sums; smallest and largest in turn.
PATTERNS = ("random", "lowest", "ends")


def make_codes(
    shape: tuple[int, ...], bits: int, pattern: str, generator: torch.Generator
) -> Tensor:
    """int8 codes of `bits` in one of `PATTERNS`, on the generator's device."""
    half = 2 ** (bits - 1)
    device = generator.device
    if pattern == "random":
        return torch.randint(
            -half, half, shape, generator=generator, device=device, dtype=torch.int8
        )
    if pattern == "lowest":
        return torch.full(shape, -half, dtype=torch.int8, device=device)
    column = torch.arange(shape[-1], device=device) % 2
    return torch.where(column == 0, -half, half - 1).to(torch.int8).expand(shape).contiguous()


def make_linear(
    spec: LinearSpec, pattern: str, generator: torch.Generator, *, bias: bool
) -> StoredLinear:
    """A linear of codes in `pattern`, whose steps are exact in bfloat16 and float16."""
    n, k = spec.out_features, spec.in_features
    zeros = None
    if spec.zero_points:
        zeros = make_codes((n, spec.groups), spec.weight_bits, "random", generator)
    # 1.0 .. 1.99 in 7 bits of mantissa, times a power of two that keeps float16 outputs finite.
    exponent = min(21, 7 + spec.weight_bits + spec.activation_bits)
    mantissa = torch.randint(
        128, 256, (n, spec.groups), generator=generator, device=generator.device
    )
    added = None
    if bias:
        added = torch.randn(n, generator=generator, device=generator.device).to(spec.dtype)
    codes = make_codes((n, k), spec.weight_bits, pattern, generator)
    return StoredLinear(pack(codes, spec.weight_bits), mantissa * 2.0**-exponent, zeros, added)


def make_random_words(spec: LinearSpec, generator: torch.Generator) -> StoredLinear:
    """A linear of random bits without bias or zero points: made fast, for timing alone.

    K must fill whole words.
    """
    words = words_per_row(spec.in_features, spec.weight_bits)
    shape = (spec.out_features, words)
    packed = torch.randint(
        -(2**31), 2**31, shape, generator=generator, device=generator.device, dtype=torch.int32
    )
    step = torch.full((spec.out_features, spec.groups), 2.0**-9, device=generator.device)
    return StoredLinear(packed, step)


def make_token_step(tokens: int, generator: torch.Generator) -> Tensor:
    """float32 [tokens, 1] in [0.01, 1.01)."""
    return torch.rand(tokens, 1, generator=generator, device=generator.device) + 0.01


def laid_out(codes: Tensor, layout: CodeLayout, columns: int) -> Tensor:
    """`codes` as a kernel takes them, contiguous."""
    return lay_out(codes, layout, columns).contiguous()


def generator_on(device: Device, seed: int) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator(device=device.kind).manual_seed(seed)

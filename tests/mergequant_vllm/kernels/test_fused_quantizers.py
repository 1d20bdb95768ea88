"""The quantizers' forms for a compiler: equal to the definitions, and one GPU kernel each.

The kernels are counted in the code that TorchInductor generates for an NVIDIA GPU, which needs no
GPU; in a process of its own, since Inductor remembers the device it was told of.
"""

import itertools
import json
import subprocess
import sys

import pytest
import torch

from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.norm_round import fused as norm_round_fused
from mergequant_vllm.kernels.norm_round import reference as norm_round
from mergequant_vllm.kernels.token_quant import fused as token_quant_fused
from mergequant_vllm.kernels.token_quant import reference as token_quant

# (n, K, columns): padded, more channels than n, fewer, an n that no tile divides, three slabs.
SIZES = [(64, 64, 64), (64, 64, 96), (64, 80, 128), (64, 40, 64), (50, 50, 64), (64, 130, 256)]


@pytest.mark.parametrize("layout", list(CodeLayout))
@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize(("n", "k", "columns"), SIZES)
def test_static_codes_equal_the_reference(
    layout: CodeLayout, with_offset: bool, n: int, k: int, columns: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.randn(5, n, generator=generator)
    x[0] = torch.arange(n) - n // 2 + 0.5
    offset = torch.rand(k, generator=generator) - 0.5 if with_offset else None
    indices: list[torch.Tensor | None] = [None] if k == n else []
    indices.append(torch.randint(0, n, (k,), generator=generator, dtype=torch.int32))
    for index in indices:
        slabs = norm_round_fused.plan_slabs(n, layout, index, offset, columns)
        codes = norm_round_fused.static_codes(x, 4, layout, slabs, columns)
        expected = norm_round.static_codes(
            x, 4, layout, index=index, offset=offset, columns=columns
        )
        assert codes.dtype == expected.dtype
        assert torch.equal(codes, expected)


@pytest.mark.parametrize("layout", list(CodeLayout))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 2, 50, 51, 64])
def test_token_codes_equal_the_reference(
    layout: CodeLayout, dtype: torch.dtype, channels: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, channels, generator=generator).to(dtype)
    x[3] = 0
    clip = torch.tensor([0.7])
    for bits, columns, zero_points in itertools.product((4, 8), (None, 128), (False, True)):
        if layout is CodeLayout.NIBBLES and (bits == 8 or (columns is None and channels % 2)):
            continue
        form = {"columns": columns, "zero_points": zero_points}
        fused = token_quant_fused.token_codes(x, clip, bits, layout, **form)
        expected = token_quant.token_codes(x, clip, bits, layout, **form)
        for mine, theirs in zip(fused, expected, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert mine.dtype == theirs.dtype
                assert torch.equal(mine, theirs)


def count_kernels() -> dict[str, int]:
    """Triton kernels of each case of `fused_cases`, for few and for many tokens: the larger."""
    command = [sys.executable, "-m", "tests.mergequant_vllm.kernels.fused_cases"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counts


def test_norm_and_rounding_are_one_gpu_kernel() -> None:
    """Residual add, norm, gather, offset, round, clamp and packing; and so for each token step."""
    if torch.__version__.split("+")[0].rsplit(".", 1)[0] != "2.13":
        pytest.skip("the harness reaches into Inductor as PyTorch 2.13 has it")
    pytest.importorskip("vllm", reason="the norm and the activation function are vLLM's")
    pytest.importorskip("triton", reason="Triton is not installed")
    counts = count_kernels()
    assert counts.pop("static, padded, by the reference") == 2
    assert counts.pop("norm alone") == 1
    assert set(counts.values()) == {1}, counts
    assert len(counts) == 12

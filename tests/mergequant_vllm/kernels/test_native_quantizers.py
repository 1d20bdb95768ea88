"""The native quantizers equal their definitions, to the last bit, in every instruction set."""

import itertools

import pytest
import torch
from torch import Tensor

from mergequant_vllm.kernels import native_library as native
from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.hadamard.cpu import mix_heads_native
from mergequant_vllm.kernels.hadamard.reference import mix_heads, rotate
from mergequant_vllm.kernels.norm_round import cpu as norm_round_native
from mergequant_vllm.kernels.norm_round import reference as norm_round
from mergequant_vllm.kernels.token_quant import cpu as token_quant_native
from mergequant_vllm.kernels.token_quant import reference as token_quant

INT8 = CodeLayout.INT8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 15, 16, 17, 43, 64, 127, 352, 4096]
pytestmark = pytest.mark.usefixtures("isa")


def random(*shape: int, scale: float = 5.0, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def check_tokens(x: Tensor, clip: float, bits: int, block: int | None, columns: int) -> None:
    for zero_points in (False, True):
        form = {"hadamard": block, "columns": columns, "zero_points": zero_points}
        fast = token_quant_native.token_codes(x, torch.tensor([clip]), bits, INT8, **form)
        slow = token_quant.token_codes(x, torch.tensor([clip]), bits, INT8, **form)
        assert (fast[2] is not None) is zero_points
        for mine, theirs in zip(fast, slow, strict=True):
            assert (mine is None and theirs is None) or torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_token_codes(dtype: torch.dtype, bits: int) -> None:
    for k, tokens in itertools.product(WIDTHS, (0, 1, 2, 33)):
        for clip in (1.0, 0.73):
            check_tokens(random(tokens, k, seed=k).to(dtype), clip, bits, None, k + 3)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_token_codes(dtype: torch.dtype, block: int) -> None:
    for blocks in (1, 3):
        check_tokens(random(5, blocks * block).to(dtype), 0.9, 4, block, blocks * block)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 128, 1024])
def test_the_rotation(block: int) -> None:
    x = random(7, 3 * block)
    y = torch.empty_like(x)
    native.call("mq_hadamard", x.data_ptr(), y.data_ptr(), 7, 3 * block, block)
    assert torch.equal(y, rotate(x, block))


@pytest.mark.parametrize("heads", [(1, 7), (2, 3), (3, 5), (8, 64), (7, 16), (28, 9), (32, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mixing_of_heads(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    size = heads[0] * heads[1]
    for tokens in (0, 1, 2, 300):
        for runs in (1, 2):
            x = random(tokens, runs * size + 3).to(dtype)[:, 2:-1]
            assert torch.equal(mix_heads_native(x, *heads), mix_heads(x, heads))
    with pytest.raises(ValueError, match="4 channels are not whole runs of 3 heads of 2"):
        mix_heads_native(random(2, 4), 3, 2)


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_tokens_of_any_size(scale: float) -> None:
    x = random(6, 40, scale=1.0).clamp(-1, 1) * scale
    x[1] = 0.0
    x[2], x[3], x[4] = x[2].abs(), -x[3].abs(), -0.0
    check_tokens(x, 0.9, 4, None, 40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_static_codes(dtype: torch.dtype, bits: int) -> None:
    for n in WIDTHS:
        check_static(dtype, bits, n)


def check_static(dtype: torch.dtype, bits: int, n: int) -> None:
    k = n + n // 3
    index = torch.randint(0, n, (k,), generator=torch.Generator().manual_seed(n)).to(torch.int32)
    offset = random(k, scale=0.3, seed=1)
    for tokens in (0, 1, 40):
        x = random(tokens, n, scale=4.0 if bits == 4 else 60.0).to(dtype)
        for chosen in (None, index):
            shift = offset[: n if chosen is None else k]
            for added in (None, shift):
                for columns in (None, k + 5):
                    form = {"index": chosen, "offset": added, "columns": columns}
                    codes = norm_round_native.static_codes(x, bits, INT8, **form)
                    assert torch.equal(codes, norm_round.static_codes(x, bits, INT8, **form))


def test_ties_and_extremes_of_static_codes() -> None:
    x = torch.cat((torch.arange(-40, 41) / 4, torch.tensor([-1e30, 1e30, -torch.inf, torch.inf])))
    for bits in (4, 8):
        codes = norm_round_native.static_codes(x[None], bits, INT8)
        assert torch.equal(codes, norm_round.static_codes(x[None], bits, INT8))


def test_rows_may_be_apart() -> None:
    wide = random(2, 6, 100)
    x = wide[..., 10:90]
    check_tokens(x, 1.0, 4, 16, 80)
    codes = norm_round_native.static_codes(x, 4, INT8)
    assert torch.equal(codes, norm_round.static_codes(x, 4, INT8))


def test_other_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="int8 codes, not nibbles"):
        norm_round_native.static_codes(random(1, 8), 4, CodeLayout.NIBBLES)
    with pytest.raises(ValueError, match="int8 codes, not nibbles"):
        token_quant_native.token_codes(random(1, 8), torch.ones(1), 4, CodeLayout.NIBBLES)


def test_the_operators_are_traced_by_the_compiler() -> None:
    x, clip = random(3, 64), torch.tensor([0.9])
    torch.library.opcheck(token_quant_native.token_quant_native, (x, clip, 4, 16, 80, False))
    torch.library.opcheck(token_quant_native.token_quant_native, (x, clip, 4, 16, 80, True))
    torch.library.opcheck(mix_heads_native, (x, 4, 16))
    index = torch.arange(64, dtype=torch.int32)
    operator = norm_round_native.static_round_native
    torch.library.opcheck(operator, (x, index, torch.zeros(64), 4, 80))

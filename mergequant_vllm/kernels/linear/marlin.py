"""INT4 linear on GPUs by vLLM's precompiled Marlin kernel: int8 codes, weights at 4 bits in memory.

vLLM's operations are called directly: its own function around them, `apply_gptq_marlin_linear`,
multiplies the token's scale by a factor that weights with one step per output channel do not have.

Stored layout: int32 [N, words], eight codes + 8 a word along K, lowest nibble first.
Kernel layout, both sizes padded to Marlin's tiles (N to 64 and K to 128, or N to 128 and K to 64):

* weight int32 [K/16, 2N]: tiles of 32 inputs by 32 outputs, each in the order in which the lanes of
  a warp hold the operand of an m16n8k32 matrix instruction, repacked by `gptq_marlin_repack`;
* weight_step [1, N] and bias [N] in the model's dtype, in the order in which lanes hold the result.
  The bias is the reference's constant, rounded to that dtype: exact for a bias alone, a further
  rounding for a float32 output offset or for the sum of both.

Numerics, as the kernel's source has them. Each warp sums its share of the channels exactly in
int32 and takes float32(sum) * token_step; the warps of a thread block (at most two to an output)
are added in float32 and multiplied by weight_step; the P thread blocks that share an output are
added in float32; the result is cast to the output's dtype, and the bias is added in that dtype, a
second rounding where the reference has one. P depends on the shape and on the GPU.

* Static activations without a constant equal the reference bit for bit while
  sum_k |x[t, k] * w[j, k]| <= 2^16 (1024 channels of 4 x 4 bits at worst): a weight step has 8
  significant bits, so that every product and every sum above is exact.
* So do dynamic activations without a constant where one warp has all channels: the order is then
  the reference's.
* Otherwise, before the cast, both differ by at most
  (P + 6) * 2^-24 * sum_k |x[t, k] * w[j, k]| * token_step * weight_step, to first order.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout, CodeWriter, as_rows
from mergequant_vllm.kernels.linear import refusals
from mergequant_vllm.kernels.linear.spec import LinearSpec, PreparedLinear, StoredLinear
from mergequant_vllm.kernels.torch_operator import define_operator

WEIGHT_BITS = 4
OLDEST_CAPABILITY = 80
CODES_PER_WORD = 8

# The kernel reads one activation scale a row and checks nothing. Static linears keep this many
# ones (64 KiB); a longer batch allocates its own.
ROWS_OF_ONES = 16384

_LOCKS_PER_PROCESSOR = 4  # as vLLM allocates them; the kernel wants one at least
_WORD_OF_ZEROS = 0x88888888 - 2**32  # eight times code 0, which is 8 there, in an int32


def marlin_words(weight_packed: Tensor, columns: int, padded_n: int, padded_k: int) -> Tensor:
    """The stored words as `gptq_marlin_repack` takes them.

    Args:
        weight_packed: int32 [N, words], see `packing`.
        columns: K; the nibbles of the last word beyond it are 0, which is code -8.
        padded_n: N padded to Marlin's tiles.
        padded_k: K padded to Marlin's tiles, a multiple of 8.

    Returns:
        int32 [padded_k / 8, padded_n], contiguous; all padding is code 0.
    """
    words = weight_packed.clone()
    if columns % CODES_PER_WORD:
        zeros = words.new_full((), _WORD_OF_ZEROS)
        words[:, -1] |= zeros << (WEIGHT_BITS * (columns % CODES_PER_WORD))
    missing = (0, padded_k // CODES_PER_WORD - words.shape[1], 0, padded_n - words.shape[0])
    return F.pad(words, missing, value=_WORD_OF_ZEROS).T.contiguous()


@functools.cache
def _argument_names(function: Callable[..., Tensor]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _call(function: Callable[..., Tensor], device: torch.device, **arguments: Any) -> Tensor:
    """Call one of vLLM's Marlin functions, whose arguments differ between versions.

    0.26 also asks for an order of the input channels, which 0.32 has no more: `g_idx` and `perm`,
    empty for the natural order, and `is_k_full`, which means nothing without them.
    """
    names = _argument_names(function)
    for name in {"g_idx", "perm"} & names:
        arguments[name] = torch.empty(0, dtype=torch.int32, device=device)
    if "is_k_full" in names:
        arguments["is_k_full"] = True
    return function(**arguments)


def _launch(
    codes: Tensor,
    weight: Tensor,
    weight_step: Tensor,
    token_step: Tensor | None,
    ones: Tensor,
    bias: Tensor | None,
    workspace: Tensor,
    out_features: int,
) -> Tensor:
    """Launch vLLM's kernel; opaque to torch.compile, so that it may look at the number of rows.

    Args:
        codes: int8 [..., padded K].
        weight: int32 [padded K / 16, 2 * padded N], repacked.
        weight_step: float16 or bfloat16 [1, padded N], permuted.
        token_step: float32 [..., 1] or None.
        ones: float32 [any], stands for the token steps if there are none.
        bias: [padded N] in the dtype of `weight_step`, permuted, or None.
        workspace: int32 zeros, one a multiprocessor at least: locks, 0 again after the call.
        out_features: N.

    Returns:
        [..., N] in the dtype of `weight_step`.
    """
    from vllm import _custom_ops
    from vllm.scalar_type import scalar_types

    rows = as_rows(codes)
    tokens = rows.shape[0]
    if token_step is not None:
        scales = token_step.to(torch.float32).reshape(-1).contiguous()
    else:
        scales = ones[:tokens] if tokens <= ones.numel() else ones.new_ones(tokens)
    y = _call(
        _custom_ops.marlin_gemm,
        rows.device,
        a=rows,
        c=None,
        b_q_weight=weight,
        b_bias=bias,
        b_scales=weight_step,
        a_scales=scales,
        global_scale=None,
        b_zeros=None,
        workspace=workspace,
        b_q_type=scalar_types.uint4b8,
        size_m=tokens,
        size_n=weight_step.shape[1],
        size_k=rows.shape[1],
        use_fp32_reduce=True,
    )
    return y[:, :out_features].contiguous().reshape(*codes.shape[:-1], out_features)


def _fake(codes: Tensor, weight: Tensor, weight_step: Tensor, *others: Any) -> Tensor:
    out_features: int = others[-1]
    return codes.new_empty((*codes.shape[:-1], out_features), dtype=weight_step.dtype)


marlin_int8 = define_operator("marlin_int8", _launch, _fake)


class MarlinLinear:
    """Weights stay at 4 bits in memory, sums are int32; see the module's docstring."""

    name = "marlin-int8"
    layout = CodeLayout.INT8
    writer = CodeWriter.GPU

    def refusal(self, spec: LinearSpec) -> str | None:
        """Refuses what the kernel cannot hold, old GPUs and a vLLM without it."""
        return (
            refusals.device(spec)
            or refusals.capability(spec.capability, OLDEST_CAPABILITY)
            or _refuse_width(spec.weight_bits)
            or refusals.groups(spec)
            or refusals.zero_points(spec)
            or refusals.token_zero_points(spec)
            or refusals.dtype(spec)
            or _missing_operations()
        )

    def prepare(self, stored: StoredLinear, spec: LinearSpec) -> PreparedLinear:
        """See the module's docstring."""
        return _Prepared(stored, spec)


def _refuse_width(bits: int) -> str | None:
    if bits == WEIGHT_BITS:
        return None
    return f"it reads {WEIGHT_BITS}-bit weights and the layer has {bits} bits"


def _missing_operations() -> str | None:
    return refusals.operations("gptq_marlin_repack", "marlin_gemm")


class _Prepared(PreparedLinear):
    weight: Tensor
    weight_step: Tensor
    ones: Tensor
    workspace: Tensor

    def __init__(self, stored: StoredLinear, spec: LinearSpec) -> None:
        from vllm import _custom_ops
        from vllm.model_executor.layers.quantization.utils import marlin_utils

        super().__init__()
        N, K = spec.out_features, spec.in_features
        device = stored.weight_packed.device
        padded_n, padded_k = marlin_utils.marlin_padded_nk(N, K)
        weight = _call(
            _custom_ops.gptq_marlin_repack,
            device,
            b_q_weight=marlin_words(stored.weight_packed, K, padded_n, padded_k),
            size_k=padded_k,
            size_n=padded_n,
            num_bits=WEIGHT_BITS,
            is_a_8bit=True,
        )
        step = F.pad(stored.weight_step.to(spec.dtype).T, (0, padded_n - N))
        step = marlin_utils.marlin_permute_scales(step, padded_k, padded_n, -1, is_a_8bit=True)

        def lay_out(constant: Tensor) -> Tensor:
            padded = F.pad(constant.to(spec.dtype), (0, padded_n - N))
            permuted: Tensor = marlin_utils.marlin_permute_bias(padded)
            return permuted

        self.columns = padded_k
        self.out_features = N
        self.register_buffer("weight", weight)
        self.register_buffer("weight_step", step)
        self.keep_constants(stored, lay_out)
        rows = 0 if spec.dynamic else ROWS_OF_ONES
        self.register_buffer("ones", torch.ones(rows, dtype=torch.float32, device=device))
        workspace = marlin_utils.marlin_make_workspace_new(device, _LOCKS_PER_PROCESSOR)
        self.register_buffer("workspace", workspace)

    def forward(
        self, codes: Tensor, token_step: Tensor | None, token_zero: Tensor | None, add_bias: bool
    ) -> Tensor:
        """Compute `reference`, up to the numerics in the module's docstring."""
        y: Tensor = marlin_int8(
            codes,
            self.weight,
            self.weight_step,
            token_step,
            self.ones,
            self.constant(add_bias),
            self.workspace,
            self.out_features,
        )
        return y

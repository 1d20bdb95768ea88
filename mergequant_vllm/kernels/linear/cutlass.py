"""INT4 linear on GPUs by vLLM's CUTLASS int8 kernels: weights unpacked to int8, an explicit choice.

Stored layout: int32 [N, words], see `packing`.
Kernel layout: int8 [N, K], both sizes padded with code 0 to multiples of 16, without which vLLM
would run a Triton kernel instead; multiplied as [K, N], column-major. Twice the size at 4 bits.

Numerics, as the kernels' source has them: exact int32 sums, then, in float32,

    token_step * (float32(sum) * weight_step) + bias

the last product and sum fused or not, and one cast. The reference takes the token's step first. The
bias is the reference's constant rounded to the model's dtype: exact for a bias alone, a further
rounding for a float32 output offset or for the sum of both.

* Static activations equal the reference bit for bit: the token step is 1.
* With token steps both differ, before the cast and to first order, by at most
  2^-22 * |y| + 2^-23 * |y + bias|, y being the product without the bias (no second term without
  a bias): each rounds y twice and the sum once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mergequant_vllm.kernels.capability import spell
from mergequant_vllm.kernels.codes import CodeLayout, CodeWriter
from mergequant_vllm.kernels.linear import refusals
from mergequant_vllm.kernels.linear.spec import LinearSpec, PreparedLinear, StoredLinear
from mergequant_vllm.packing import unpack

OLDEST_CAPABILITY = 75
FIRST_WITHOUT_INT8 = 100
ALIGNMENT = 16


class CutlassLinear:
    """8 bits in memory for each weight; see the module's docstring."""

    name = "cutlass-int8"
    layout = CodeLayout.INT8
    writer = CodeWriter.GPU

    def refusal(self, spec: LinearSpec) -> str | None:
        """Refuses what the kernels cannot hold, GPUs they are not for and a vLLM without them."""
        return (
            refusals.device(spec)
            or refusals.capability(spec.capability, OLDEST_CAPABILITY)
            or _refuse_blackwell(spec.capability)
            or refusals.groups(spec)
            or refusals.zero_points(spec)
            or refusals.token_zero_points(spec)
            or refusals.dtype(spec)
            or _missing_operation()
        )

    def prepare(self, stored: StoredLinear, spec: LinearSpec) -> PreparedLinear:
        """int8 [N, K], padded."""
        return _Prepared(stored, spec)


def _refuse_blackwell(capability: int | None) -> str | None:
    if capability is None or capability < FIRST_WITHOUT_INT8:
        return None
    return (
        "INT8 is not in vLLM's CUTLASS kernels for Blackwell "
        f"(compute capability {spell(capability)}); choose marlin-int8"
    )


def _missing_operation() -> str | None:
    return refusals.operations("cutlass_scaled_mm")


class _Prepared(PreparedLinear):
    weight: Tensor
    weight_step: Tensor
    one: Tensor

    def __init__(self, stored: StoredLinear, spec: LinearSpec) -> None:
        super().__init__()
        self.spec = spec
        more_n, more_k = -spec.out_features % ALIGNMENT, -spec.in_features % ALIGNMENT
        self.columns = spec.in_features + more_k
        codes = unpack(stored.weight_packed, spec.weight_bits, spec.in_features)
        step = stored.weight_step
        self.register_buffer("weight", F.pad(codes, (0, more_k, 0, more_n)).contiguous())
        self.register_buffer("weight_step", F.pad(step, (0, 0, 0, more_n)).contiguous())
        one = torch.ones(1, 1, dtype=torch.float32, device=codes.device)
        self.register_buffer("one", one)
        self.keep_constants(stored, lambda x: F.pad(x.to(spec.dtype), (0, more_n)).contiguous())

    def forward(
        self, codes: Tensor, token_step: Tensor | None, token_zero: Tensor | None, add_bias: bool
    ) -> Tensor:
        """Compute `reference`, up to the numerics in the module's docstring."""
        from vllm import _custom_ops

        rows = codes.reshape(-1, self.columns)
        fits = rows.stride(1) == 1 and rows.stride(0) % ALIGNMENT == 0
        y: Tensor = _custom_ops.cutlass_scaled_mm(
            rows if fits else rows.contiguous(),
            self.weight.T,
            self.one if token_step is None else token_step.reshape(-1, 1).contiguous(),
            self.weight_step,
            self.spec.dtype,
            self.constant(add_bias),
        )
        if y.shape[-1] != self.spec.out_features:
            y = y[..., : self.spec.out_features].contiguous()
        return y.reshape(*codes.shape[:-1], self.spec.out_features)

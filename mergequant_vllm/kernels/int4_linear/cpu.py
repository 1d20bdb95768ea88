"""INT4 linear on CPU: integer-valued float32 operands through PyTorch's float32 GEMM.

Products of 4-bit codes are at most 64 in magnitude, so a sum of fewer than 2^24 / 64 of them stays
below 2^24 and every partial sum, in any order, is exact in float32. On AVX2 this beats each integer
GEMM that PyTorch and oneDNN offer (K = N = 2048, M = 32: 4.3 ms against 7.3 ms and more).

Kernel layout: float32 [N, K], eight times the packed size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mergequant_vllm.kernels.int4_linear.reference import scale_products
from mergequant_vllm.kernels.int4_linear.spec import LinearSpec
from mergequant_vllm.packing import unpack

_EXACT_BELOW = 2**24


class CpuLinear:
    """Exact through float32; see the module's docstring."""

    name = "cpu-fp32"
    code_dtype = torch.float32

    def refusal(self, spec: LinearSpec) -> str | None:
        """Refuses other devices, and K so long that float32 sums could round."""
        largest_product = 2 ** (spec.weight_bits - 1) * 2 ** (spec.activation_bits - 1)
        if spec.device != "cpu":
            return f"it runs on the CPU and the layer is on {spec.device}"
        if spec.in_features * largest_product > _EXACT_BELOW:
            longest = _EXACT_BELOW // largest_product
            return f"K = {spec.in_features} is above {longest}, where float32 sums stop being exact"
        return None

    def prepare(self, weight_packed: Tensor, spec: LinearSpec) -> Tensor:
        """int32 [N, words] as stored to float32 codes [N, K]."""
        return unpack(weight_packed, spec.weight_bits, spec.in_features).to(torch.float32)

    def linear(
        self,
        codes: Tensor,
        weight: Tensor,
        weight_step: Tensor,
        token_step: Tensor | None,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """As `reference`, bit for bit."""
        return scale_products(F.linear(codes, weight), weight_step, token_step, bias, out_dtype)

"""INT4 linear on CPU: integer-valued float32 operands through PyTorch's float32 GEMM.

A sum of products of codes is exact in float32, in any order, while it stays below 2^24: 262144
channels of 4 x 4 bits, 16384 of 4 x 8. Longer sums and wider codes are summed in runs of channels
that are exact, and the runs in float64. On AVX2 this beats each integer GEMM that PyTorch and
oneDNN offer (K = N = 2048, M = 32: 4.3 ms against 7.3 ms and more).

Kernel layout: float32 [N, K], codes minus zero points; eight times the packed size at 4 bits.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout, CodeWriter
from mergequant_vllm.kernels.linear import refusals
from mergequant_vllm.kernels.linear.exactness import exact_columns
from mergequant_vllm.kernels.linear.reference import CentredLinear
from mergequant_vllm.kernels.linear.spans import run_slices
from mergequant_vllm.kernels.linear.spec import LinearSpec, PreparedLinear, StoredLinear

LARGEST_SUM = 2**24  # every integer up to it is a float32


class CpuFp32Linear:
    """Exact through float32; see the module's docstring."""

    name = "cpu-fp32"
    layout = CodeLayout.FLOAT32
    writer = CodeWriter.REFERENCE

    def refusal(self, spec: LinearSpec) -> str | None:
        """Refuses other devices."""
        return refusals.cpu(spec)

    def prepare(self, stored: StoredLinear, spec: LinearSpec) -> PreparedLinear:
        """float32 [N, K]."""
        multiply = partial(exact_sums, run=exact_columns(spec, LARGEST_SUM))
        return CentredLinear(stored, spec, torch.float32, multiply)


def exact_sums(codes: Tensor, weight: Tensor, run: int) -> Tensor:
    """Sums of products, exact if those of `run` channels are exact in float32.

    Args:
        codes: float32 [..., K], integer-valued.
        weight: float32 [N, K], integer-valued.

    Returns:
        [..., N], float32 or float64.
    """
    columns = weight.shape[1]
    if columns <= run:
        return F.linear(codes, weight)
    total = torch.zeros((), dtype=torch.float64, device=codes.device)
    for part in run_slices(columns, run):
        total = total + F.linear(codes[..., part], weight[:, part]).to(torch.float64)
    return total

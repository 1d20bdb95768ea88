"""`torch.ops.mergequant.mix_heads`: the mixing of heads, which no compiler looks into.

A compiler would contract the products and sums of the odd factor, and round once where the
definition rounds twice.
"""

import torch
from torch import Tensor

from mergequant_vllm.kernels.hadamard import reference
from mergequant_vllm.kernels.torch_operator import define_operator


def _mix(x: Tensor, count: int, width: int) -> Tensor:
    return reference.mix_heads(x, (count, width))


def _fake(x: Tensor, count: int, width: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


mix_heads_opaque = define_operator("mix_heads", _mix, _fake)

"""A linear as the server computes it: the oracle's module, and the calibrated block's.

Made of the reference operations; the integer sums go through float GEMMs in which they are exact.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mergequant_vllm.kernels.int4_linear.reference import scale_products
from mergequant_vllm.kernels.norm_round.reference import static_codes
from mergequant_vllm.kernels.token_quant.reference import token_codes

_FLOAT32_EXACT_CHANNELS = 2**24 // 64  # sums of 4-bit products stay below 2^24


class QuantizedLinear(nn.Module):
    """y = (x_int @ W_int^T) * token_step * weight_step + b.

    Args:
        codes: int8 [out, in], weight codes.
        weight_step: [out].
        bias: [out] or None.
        clip: [1], ratio of the per-token step; None for static activations, where the input is in
            units of its steps already.
        bits: width of an activation code.
        ranks: tensor-parallel size of a row-parallel linear: each shard of the input has its own
            step, and the shards' outputs are added in the output's dtype.
    """

    codes: Tensor
    weight_step: Tensor
    clip: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        weight_step: Tensor,
        bias: Tensor | None,
        clip: Tensor | None,
        bits: int,
        ranks: int = 1,
    ) -> None:
        super().__init__()
        exact = torch.float32 if codes.shape[1] <= _FLOAT32_EXACT_CHANNELS else torch.float64
        self.bits = bits
        self.ranks = ranks
        self.register_buffer("codes", codes.to(exact))
        self.register_buffer("weight_step", weight_step.to(torch.float32))
        self.register_buffer("clip", None if clip is None else clip.to(torch.float32).reshape(1))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def input_codes(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes of an input [..., in] and, if dynamic, steps [..., 1]."""
        if self.clip is None:
            return static_codes(x, self.bits, self.codes.dtype), None
        return token_codes(x, self.clip, self.bits, self.codes.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to y [..., out], same dtype."""
        shards = zip(x.chunk(self.ranks, -1), self.codes.chunk(self.ranks, -1), strict=True)
        total: Tensor | None = None
        for part, weight in shards:
            codes, token_step = self.input_codes(part)
            bias = self.bias if total is None else None
            products = F.linear(codes, weight)
            y = scale_products(products, self.weight_step, token_step, bias, x.dtype)
            total = y if total is None else total + y
        assert total is not None
        return total

"""A linear as the server's native CPU kernels compute it: several times faster than PyTorch.

Calibration spends a third of its time in the products of linears that are quantized already. The
native kernels equal the reference bit for bit, so that a checkpoint is the same with and without
them. The reference forward, which tells whether they do, does not use them.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mergequant.layers.served_linear import stored_beside_codes
from mergequant_vllm.format import LinearFormat
from mergequant_vllm.kernels.codes import CodeLayout
from mergequant_vllm.kernels.hadamard.cpu import mix_heads_native
from mergequant_vllm.kernels.linear.cpu.int4 import CpuInt4Linear
from mergequant_vllm.kernels.linear.spec import LinearSpec, StoredLinear
from mergequant_vllm.kernels.norm_round.cpu import static_codes
from mergequant_vllm.kernels.token_quant.cpu import token_codes
from mergequant_vllm.packing import pack, stored_bits


def native_linear(
    form: LinearFormat, codes: Tensor, read: Callable[[str], Tensor]
) -> "NativeLinear | None":
    """The module of a linear in float32; None where the native kernels do not run, or refuse it.

    Args:
        codes: int8 [out, K].
        read: the stored tensor of a suffix, such as `weight_scale`.
    """
    spec = LinearSpec(
        in_features=codes.shape[1],
        out_features=codes.shape[0],
        weight_bits=stored_bits(form.weight.bits),
        activation_bits=stored_bits(form.input.bits),
        dynamic=form.static is None,
        device=codes.device.type,
        dtype=torch.float32,
        group_size=form.weight.group_size,
        zero_points=form.weight.zero_points,
        segments=form.weight.segments,
        token_zero_points=form.dynamic is not None and form.dynamic.zero_points,
    )
    return None if CpuInt4Linear().refusal(spec) else NativeLinear(form, spec, codes, read)


class NativeLinear(nn.Module):
    """`ServedLinear` of one rank on a CPU, bit for bit; see `native_linear` for the arguments."""

    clip: Tensor | None
    index: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        form: LinearFormat,
        spec: LinearSpec,
        codes: Tensor,
        read: Callable[[str], Tensor],
    ) -> None:
        super().__init__()
        self.form = form
        optional = stored_beside_codes(form, read)
        bias, clip = (
            None if x is None else x.float() for x in (optional["bias"], optional["clip"])
        )
        stored = StoredLinear(
            pack(codes, form.weight.bits),
            read("weight_scale").to(torch.float32),
            optional["zero_points"],
            bias,
            optional["output_offset"],
        )
        self.product = CpuInt4Linear().prepare(stored, spec)
        self.register_buffer("clip", None if clip is None else clip.reshape(1))
        self.register_buffer("index", optional["index"])
        self.register_buffer("offset", optional["offset"])

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., in] to [..., out]."""
        bits, layout, dynamic = self.form.input.bits, CodeLayout.INT8, self.form.dynamic
        if dynamic is None:
            codes = static_codes(x, bits, layout, index=self.index, offset=self.offset)
            step = zero = None
        else:
            assert self.clip is not None
            if dynamic.heads is not None:
                x = mix_heads_native(x, *dynamic.heads)
            codes, step, zero = token_codes(
                x,
                self.clip,
                bits,
                layout,
                hadamard=dynamic.hadamard,
                zero_points=dynamic.zero_points,
            )
        y: Tensor = self.product(codes, step, zero, True)
        return y

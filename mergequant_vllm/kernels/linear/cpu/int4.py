"""INT4 linear on CPU: the native kernels, weights packed at 4 bits (8-bit weights at 8).

Kernel layout: uint8 [bytes], in the order of the instruction set that runs (csrc/linear/linear.h).
Activation codes: int8.
"""

from typing import Any

import torch
from torch import Tensor

from mergequant_vllm.kernels import native_library as native
from mergequant_vllm.kernels.codes import CodeLayout, Writer, as_rows
from mergequant_vllm.kernels.linear import refusals
from mergequant_vllm.kernels.linear.packed import PackedLinear
from mergequant_vllm.kernels.linear.spec import LinearSpec, PreparedLinear, StoredLinear
from mergequant_vllm.kernels.torch_operator import define_operator
from mergequant_vllm.packing import unpack

LARGEST_K = 65536  # sums of longer rows may leave int32: 255 * 128 * 65536 < 2^31


class CpuInt4Linear:
    """Exact, bit for bit `reference`."""

    name = "cpu-int4"
    layout = CodeLayout.INT8
    writer = Writer.NATIVE

    def refusal(self, spec: LinearSpec) -> str | None:
        """Refuses other devices, and machines where the library does not run."""
        reason = refusals.cpu(spec)
        if reason is not None:
            return reason
        if spec.dtype not in native.TYPES:
            return f"it computes in float32, bfloat16 and float16, not {spec.dtype_name}"
        if spec.segments is not None or spec.token_zero_points:
            return refusals.segments(spec) or refusals.token_zero_points(spec)
        if spec.in_features > LARGEST_K:
            return f"it sums up to {LARGEST_K} channels and the layer has {spec.in_features}"
        return native.refusal()

    def prepare(self, stored: StoredLinear, spec: LinearSpec) -> PreparedLinear:
        """uint8 [bytes]."""
        codes = unpack(stored.weight_packed, spec.weight_bits, spec.in_features)
        return PackedLinear(
            spec.in_features,
            stored,
            pack_weight(codes, spec.weight_bits, spec.group_size),
            stored.weight_step.contiguous(),
            stored.zero_points,
            integer_linear_cpu,
            (
                spec.in_features,
                spec.weight_bits,
                spec.activation_bits,
                spec.group_size,
                spec.dtype,
            ),
        )


def pack_weight(codes: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Weight codes int8 [N, K] in the layout of the instruction set: uint8 [bytes]."""
    rows, columns = codes.shape
    form = (rows, columns, group_size or 0, bits)
    size = native.library().mq_linear_bytes(native.current_isa(), *form)
    packed = torch.empty(size, dtype=torch.uint8)
    codes = codes.to(torch.int8).contiguous()
    native.call("mq_linear_pack", codes.data_ptr(), *form, packed.data_ptr())
    return packed


def integer_linear(
    codes: Tensor,
    weight: Tensor,
    weight_step: Tensor,
    zero_points: Tensor | None,
    token_step: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    weight_bits: int,
    activation_bits: int,
    group_size: int | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The operator: opaque to torch.compile.

    Args:
        codes: int8 [..., columns], columns at least K; rows may be further apart.
        weight: uint8 [bytes], see `pack_weight`.
        weight_step: float32 [N, groups], contiguous.
        zero_points: int8 [N, groups], contiguous, or None.
        token_step: float32 [..., 1] or None.
        bias: [N] of `out_dtype`, or None.
        in_features: K.
        weight_bits: width of a weight code.
        activation_bits: width of an activation code.
        group_size: inputs that share a step; None: all.
        out_dtype: dtype of the result.

    Returns:
        `out_dtype` [..., N].
    """
    rows = as_rows(codes, alignment=1)
    outputs = weight_step.shape[0]
    y = codes.new_empty((*codes.shape[:-1], outputs), dtype=out_dtype)
    if rows.shape[0] == 0:
        return y
    step = None if token_step is None else token_step.contiguous()
    bias = None if bias is None else bias.to(out_dtype)
    native.call(
        "mq_linear",
        rows.data_ptr(),
        rows.stride(0),
        rows.shape[0],
        weight.data_ptr(),
        weight_step.data_ptr(),
        None if zero_points is None else zero_points.data_ptr(),
        None if step is None else step.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        native.TYPES[out_dtype],
        outputs,
        in_features,
        group_size or 0,
        weight_bits,
        activation_bits,
    )
    return y


def _fake(codes: Tensor, weight: Tensor, weight_step: Tensor, *others: Any) -> Tensor:
    out_dtype: torch.dtype = others[-1]
    return codes.new_empty((*codes.shape[:-1], weight_step.shape[0]), dtype=out_dtype)


integer_linear_cpu = define_operator("integer_linear_cpu", integer_linear, _fake)

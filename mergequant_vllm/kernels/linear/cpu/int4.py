"""INT4 linear on CPU: the native kernels, weights packed at 4 bits (8-bit weights at 8).

Kernel layout: uint8 [bytes], in the order of the instruction set that runs (csrc/linear/linear.h).
Activation codes: int8.
"""

from typing import Any

import torch
from torch import Tensor

from mergequant_vllm.kernels import huge_pages
from mergequant_vllm.kernels import native_library as native
from mergequant_vllm.kernels.codes import CodeLayout, CodeWriter, as_rows
from mergequant_vllm.kernels.linear import refusals
from mergequant_vllm.kernels.linear.exactness import INT32, exact_columns
from mergequant_vllm.kernels.linear.packed import PackedLinear
from mergequant_vllm.kernels.linear.reference import weight_sums
from mergequant_vllm.kernels.linear.spec import LinearSpec, PreparedLinear, StoredLinear
from mergequant_vllm.kernels.token_quant.cpu import token_quant
from mergequant_vllm.kernels.torch_operator import define_operator
from mergequant_vllm.packing import unpack

NIBBLE = 15  # as which the kernel multiplies a weight of 3 or 4 bits


class CpuInt4Linear:
    """Exact, bit for bit `reference`."""

    name = "cpu-int4"
    layout = CodeLayout.INT8
    writer = CodeWriter.NATIVE

    def refusal(self, spec: LinearSpec) -> str | None:
        """Refuses other devices, and machines where the library does not run."""
        reason = refusals.cpu(spec)
        if reason is not None:
            return reason
        if spec.dtype not in native.TYPES:
            return f"it computes in float32, bfloat16 and float16, not {spec.dtype_name}"
        return refusals.sums(spec, exact_columns(spec, INT32, NIBBLE)) or native.refusal()

    def prepare(self, stored: StoredLinear, spec: LinearSpec) -> PreparedLinear:
        """uint8 [bytes]."""
        native.register_operators()
        codes = unpack(stored.weight_packed, spec.weight_bits, spec.in_features)
        spans = spec.spans
        ends = None if spans is None else torch.tensor([x.stop for x in spans], dtype=torch.int32)
        return CpuPackedLinear(
            spec.in_features,
            stored,
            pack_weight(codes, spec.weight_bits),
            stored.weight_step.contiguous(),
            stored.zero_points,
            weight_sums(stored, spec),
            ends,
            integer_linear_cpu,
            (spec.in_features, spec.weight_bits, spec.activation_bits, spec.dtype),
        )


class CpuPackedLinear(PackedLinear):
    """Besides codes it takes what is still to be quantized token by token, in one call."""

    def from_tokens(
        self, x: Tensor, clip: Tensor, hadamard: int | None, zero_points: bool, add_bias: bool
    ) -> Tensor:
        """Compute `forward` of the codes of x [..., K], see `TokenQuantizer`."""
        in_features, weight_bits, activation_bits, dtype = self._form
        y: Tensor = token_linear_cpu(
            x,
            clip,
            hadamard or 0,
            zero_points,
            self.weight,
            self.weight_step,
            self.zero_points,
            self.weight_sums,
            self.spans,
            self.constant(add_bias),
            in_features,
            self.columns,
            weight_bits,
            activation_bits,
            dtype,
        )
        return y


def pack_weight(codes: Tensor, bits: int) -> Tensor:
    """Return weight codes int8 [N, K] in the layout of the instruction set: uint8 [bytes]."""
    rows, columns = codes.shape
    size = native.library().mq_linear_bytes(native.current_isa(), rows, columns, bits)
    packed = huge_pages.empty(size)
    codes = codes.to(torch.int8).contiguous()
    native.call("mq_linear_pack", codes.data_ptr(), rows, columns, bits, packed.data_ptr())
    return packed


def integer_linear(
    codes: Tensor,
    weight: Tensor,
    weight_step: Tensor,
    zero_points: Tensor | None,
    weight_sums: Tensor | None,
    span_ends: Tensor | None,
    token_step: Tensor | None,
    token_zero: Tensor | None,
    constant: Tensor | None,
    in_features: int,
    weight_bits: int,
    activation_bits: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """The operator: opaque to torch.compile.

    Args:
        codes: int8 [..., columns], columns at least K; rows may be further apart.
        weight: uint8 [bytes], see `pack_weight`.
        weight_step: float32 [N, spans], contiguous.
        zero_points: int8 [N, spans], contiguous, or None.
        weight_sums: int32 [N, spans], contiguous; needed with token_zero.
        span_ends: int32 [spans], the column behind each span; None: one step per output channel.
        token_step: float32 [..., 1] or None.
        token_zero: int32 [..., 1] or None.
        constant: float32 [N], contiguous, or None.
        in_features: K.
        weight_bits: width of a weight code.
        activation_bits: width of an activation code.
        out_dtype: dtype of the result.

    Returns:
        `out_dtype` [..., N].
    """
    rows = as_rows(codes, alignment=1)
    outputs, spans = weight_step.shape
    y = codes.new_empty((*codes.shape[:-1], outputs), dtype=out_dtype)
    if rows.shape[0] == 0:
        return y
    step = None if token_step is None else token_step.contiguous()
    zero = None if token_zero is None else token_zero.contiguous()
    native.call(
        "mq_linear",
        rows.data_ptr(),
        rows.stride(0),
        rows.shape[0],
        weight.data_ptr(),
        weight_step.data_ptr(),
        _address(zero_points),
        _address(weight_sums),
        _address(step),
        _address(zero),
        _address(constant),
        y.data_ptr(),
        native.TYPES[out_dtype],
        outputs,
        in_features,
        _address(span_ends),
        spans,
        weight_bits,
        activation_bits,
    )
    return y


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _fake(codes: Tensor, weight: Tensor, weight_step: Tensor, *others: Any) -> Tensor:
    out_dtype: torch.dtype = others[-1]
    return codes.new_empty((*codes.shape[:-1], weight_step.shape[0]), dtype=out_dtype)


integer_linear_cpu = define_operator("integer_linear_cpu", integer_linear, _fake)


def token_linear(
    x: Tensor,
    clip: Tensor,
    block: int,
    token_zero_points: bool,
    weight: Tensor,
    weight_step: Tensor,
    zero_points: Tensor | None,
    weight_sums: Tensor | None,
    span_ends: Tensor | None,
    constant: Tensor | None,
    in_features: int,
    columns: int,
    weight_bits: int,
    activation_bits: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Quantize each token and multiply: `token_quant_native`, then `integer_linear`."""
    codes, step, zero = token_quant(x, clip, activation_bits, block, columns, token_zero_points)
    return integer_linear(
        codes,
        weight,
        weight_step,
        zero_points,
        weight_sums,
        span_ends,
        step,
        zero if token_zero_points else None,
        constant,
        in_features,
        weight_bits,
        activation_bits,
        out_dtype,
    )


def _fake_token_linear(x: Tensor, *others: Any) -> Tensor:
    weight_step, out_dtype = others[4], others[-1]
    return x.new_empty((*x.shape[:-1], weight_step.shape[0]), dtype=out_dtype)


token_linear_cpu = define_operator("token_linear_cpu", token_linear, _fake_token_linear)

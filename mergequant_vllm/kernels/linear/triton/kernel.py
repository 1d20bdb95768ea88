"""INT4 linear on GPUs, the portable one: a Triton kernel over int8 tensor cores.

Kernel layout: weights int8 [N, bytes] (`layout`), at 3, 4 or 8 bits until they are in registers;
steps, zero points and weight sums [spans, N]. Activation codes are int8 [..., columns], columns
being K padded to whole tiles. The arithmetic is in `program`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mergequant_vllm.kernels.capability import current_capability
from mergequant_vllm.kernels.codes import CodeLayout, CodeWriter
from mergequant_vllm.kernels.linear import refusals
from mergequant_vllm.kernels.linear.exactness import INT32, exact_columns
from mergequant_vllm.kernels.linear.packed import PackedLinear
from mergequant_vllm.kernels.linear.reference import weight_sums
from mergequant_vllm.kernels.linear.spec import LinearSpec, PreparedLinear, StoredLinear
from mergequant_vllm.kernels.linear.triton.layout import SHORTEST_RUN, to_kernel_layout
from mergequant_vllm.kernels.linear.triton.operator import integer_linear_triton
from mergequant_vllm.kernels.linear.triton.tiles import LinearShape
from mergequant_vllm.kernels.triton_mode import interpreted
from mergequant_vllm.packing import unpack

OLDEST_CAPABILITY = 80  # Triton compiles no int8 products for older GPUs

SHIFTED = 2**7  # the most that a code is in the top bits of an int8

_OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonLinear:
    """Weights stay packed in memory; exact through int32 sums."""

    name = "triton"
    layout = CodeLayout.INT8
    writer = CodeWriter.GPU

    def refusal(self, spec: LinearSpec) -> str | None:
        """Refuses other widths, a missing Triton and, unless interpreted, CPUs and old GPUs."""
        reason = _form_refusal(spec)
        if reason is not None:
            return reason
        try:
            import triton
            import triton.language  # noqa: F401
        except ImportError as error:
            return f"Triton cannot be imported ({error})"
        return None if interpreted() else _device_refusal(spec)

    def prepare(self, stored: StoredLinear, spec: LinearSpec) -> PreparedLinear:
        """See the module's docstring."""
        form = (spec.in_features, spec.weight_bits, spec.group_size, spec.segments)
        shape = LinearShape(spec.out_features, *form)
        codes = unpack(stored.weight_packed, spec.weight_bits, spec.in_features)
        zeros, sums, ends = stored.zero_points, weight_sums(stored, spec), shape.segment_ends()
        device = stored.weight_packed.device
        return PackedLinear(
            shape.layout.columns,
            stored,
            to_kernel_layout(codes, shape.layout),
            # Groups beyond K add 0 * -1 = -0, which changes no sum, not even the sign of a 0.
            spans_first(stored.weight_step, shape, -1),
            None if zeros is None else spans_first(zeros, shape, 0),
            None if sums is None else spans_first(sums, shape, 0),
            None if ends is None else torch.tensor(ends, dtype=torch.int32, device=device),
            integer_linear_triton,
            (*form, spec.dtype),
        )


def spans_first(per_span: Tensor, shape: LinearShape, padding: float) -> Tensor:
    """Return [N, spans] as [spans, N], with `padding` for the groups beyond K."""
    missing = shape.spans - per_span.shape[1]
    return F.pad(per_span, (0, missing), value=padding).T.contiguous()


def _form_refusal(spec: LinearSpec) -> str | None:
    if spec.weight_bits not in (3, 4, 8):
        return f"it reads weights of 3, 4 and 8 bits and the layer has {spec.weight_bits}"
    if spec.activation_bits not in (4, 8):
        return f"it takes codes of 4 and 8 bits and the layer has {spec.activation_bits}"
    if spec.group_size is not None and spec.group_size % SHORTEST_RUN:
        return (
            f"it takes groups of whole multiples of {SHORTEST_RUN} channels and the layer's have "
            f"{spec.group_size}"
        )
    if spec.dtype not in _OUT_DTYPES:
        return f"it writes bfloat16, float16 and float32 and the model has {spec.dtype}"
    return refusals.sums(spec, exact_columns(spec, INT32, SHIFTED))


def _device_refusal(spec: LinearSpec) -> str | None:
    if spec.device != "cuda":
        return f"it runs on GPUs (or with TRITON_INTERPRET=1) and the layer is on {spec.device}"
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs and this PyTorch is built for ROCm"
    capability = current_capability(spec.device) if spec.capability is None else spec.capability
    return refusals.capability(capability, OLDEST_CAPABILITY)

"""vLLM's linear method: creates the stored parameters, has a kernel prepare them, calls it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)

from mergequant_vllm.format import FormatError, LinearFormat
from mergequant_vllm.kernels.capability import current_capability
from mergequant_vllm.kernels.linear.cpu.int4 import CpuPackedLinear
from mergequant_vllm.kernels.linear.spec import LinearSpec, StoredLinear
from mergequant_vllm.kernels.selection.linears import select_linear
from mergequant_vllm.kernels.selection.quantizers import (
    CodeForm,
    StaticQuantizer,
    TokenQuantizer,
    writer_for,
)
from mergequant_vllm.packing import STREAM_CODES, codes_per_border, stored_bits
from mergequant_vllm.parameters import STORED, check_loaded, create_parameters, fill_dummy


@register_weight_loader_v2_supported_method
class MergeQuantLinearMethod(LinearMethodBase):
    """One linear of the server: one or several of the checkpoint's, merged along their outputs.

    Args:
        prefix: vLLM's name of the module.
        merged: formats of the checkpoint's linears, in the order in which vLLM stacks them.
        kernel: name of the kernel that the user asked for, or None.
        or_default: see `select_linear`.
    """

    def __init__(
        self,
        prefix: str,
        merged: Sequence[LinearFormat],
        kernel: str | None,
        *,
        or_default: bool = False,
    ) -> None:
        self.prefix = prefix
        self.or_default = or_default
        self.requested = kernel
        self.parts = len(merged)
        self.format = merged[0]
        for other in merged[1:]:
            if other.merge_key() != self.format.merge_key():
                raise FormatError(
                    f"The linears that vLLM merges into {prefix!r} are stored in different ways: "
                    "quantize the model again."
                )

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register empty parameters in the stored layout; refuses shards that cut them."""
        self._refuse_cut_shards(input_size_per_partition, input_size)
        loader: Callable[..., None] = extra_weight_attrs["weight_loader"]
        form = self.format
        in_features = form.columns or input_size_per_partition
        rows = sum(output_partition_sizes)
        create_parameters(layer, form, rows, in_features, self.parts, loader)
        device = layer.weight_packed.device.type
        self.spec = LinearSpec(
            in_features=in_features,
            out_features=rows,
            weight_bits=stored_bits(form.weight.bits),
            activation_bits=stored_bits(form.input.bits),
            dynamic=form.static is None,
            device=device,
            dtype=params_dtype,
            group_size=form.weight.group_size,
            segments=form.weight.segments,
            zero_points=form.weight.zero_points,
            token_zero_points=form.static is None and form.input.zero_points,
            capability=current_capability(device),
        )
        self.kernel = select_linear(self.spec, self.requested, or_default=self.or_default)
        self.dummy = get_current_vllm_config().load_config.load_format == "dummy"
        record_in_compile_cache_key(self.kernel.name)

    def _refuse_cut_shards(self, shard: int, whole: int) -> None:
        """vLLM's loader would cut packed words in silence; groups and Hadamard blocks likewise."""
        if shard == whole:
            return
        form, dynamic = self.format, self.format.dynamic
        if form.weight.segments is not None:
            raise ValueError(
                f"{self.prefix}: {whole} input channels over {whole // shard} tensor-parallel "
                f"ranks would cut its {len(form.weight.segments)} segments of columns, which have "
                "weight steps of their own: use --tensor-parallel-size 1, or quantize without "
                "segments there."
            )
        units = {
            codes_per_border(form.weight.bits): "packed words",
            form.weight.group_size or 1: "groups",
        }
        if dynamic is not None:
            units |= {dynamic.hadamard or 1: "Hadamard blocks"}
            units |= {dynamic.heads_run or 1: "runs of mixed heads"}
        cut = {unit: what for unit, what in units.items() if shard % unit}
        if not cut:
            return
        ranks = whole // shard
        fitting = [
            n
            for n in range(1, ranks)
            if whole % n == 0 and (n == 1 or not any(whole // n % unit for unit in units))
        ]
        sizes = " or ".join(str(n) for n in fitting)
        unit, what = next(iter(cut.items()))
        raise ValueError(
            f"{self.prefix}: {whole} input channels over {ranks} tensor-parallel ranks are {shard} "
            f"a rank, which is not a whole number of {what} ({unit} codes each): "
            f"use --tensor-parallel-size {sizes}{_or_smaller(what, unit, shard)}."
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Stored layout to the kernel's, once; the stored tensors are freed."""
        if hasattr(layer, "product"):
            # CUDA graphs would go on reading the old tensors.
            raise ValueError(
                f"{self.prefix}: the weights of a mergequant checkpoint cannot be loaded again "
                "into a running server: restart it."
            )
        if layer.weight_packed.is_meta:  # a head in a server that embeds or classifies
            return
        if self.dummy:
            fill_dummy(layer, self.format)
        check_loaded(layer, self.format, self.prefix)
        zeros = getattr(layer, "weight_zero_point", None)
        bias = getattr(layer, "bias", None)
        stored = StoredLinear(
            weight_packed=layer.weight_packed.data,
            weight_step=layer.weight_scale.data.contiguous(),
            zero_points=None if zeros is None else zeros.data.to(torch.int8),
            bias=None if bias is None else bias.data,
            output_offset=self._output_offset(layer),
        )
        layer.product = self.kernel.prepare(stored, self.spec)
        layer.quantizer = self._quantizer(layer)
        # Where one call quantizes each token and multiplies.
        layer.joined = (
            isinstance(layer.quantizer, TokenQuantizer)
            and isinstance(layer.product, CpuPackedLinear)
            and self.spec.activation_bits == self.format.input.bits
        )
        for name in STORED:
            if hasattr(layer, name):
                delattr(layer, name)

    def _output_offset(self, layer: Any) -> Tensor | None:
        """The constant, where this rank adds it: one of those whose outputs are added up does."""
        constant = getattr(layer, "output_offset", None)
        if constant is None or (isinstance(layer, RowParallelLinear) and layer.tp_rank > 0):
            return None
        offset: Tensor = constant.data.clone()
        return offset

    def _quantizer(self, layer: Any) -> StaticQuantizer | TokenQuantizer:
        form = CodeForm(
            bits=self.format.input.bits,
            layout=self.kernel.layout,
            columns=layer.product.columns,
            writer=writer_for(self.spec, self.kernel),
        )
        dynamic = self.format.dynamic
        if dynamic is not None:
            return TokenQuantizer(
                form,
                layer.input_clip.data[:1].clone(),
                dynamic.hadamard,
                zero_points=dynamic.zero_points,
                heads=dynamic.heads,
            )
        index, offset = getattr(layer, "input_index", None), getattr(layer, "input_offset", None)
        return StaticQuantizer(
            form,
            channels=self.format.shape[1] if self.format.norm else self.spec.in_features,
            index=None if index is None else index.data,
            offset=None if offset is None else offset.data,
            device=layer.weight_packed.device,
        )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., n] in the model's dtype (static: already divided by s) to y [..., N]."""
        if layer.joined:
            quantizer: TokenQuantizer = layer.quantizer
            joined: Tensor = layer.product.from_tokens(
                quantizer.mixed(x),
                quantizer.clip,
                quantizer.hadamard,
                quantizer.zero_points,
                bias is not None,
            )
            return joined
        codes, token_step, token_zero = layer.quantizer(x)
        y: Tensor = layer.product(codes, token_step, token_zero, bias is not None)
        return y


def record_in_compile_cache_key(kernel: str) -> None:
    """Put the kernel's name where vLLM hashes it, so that no stale graph runs another kernel.

    vLLM's compile-cache key covers its own configuration and traced files, not our environment.
    """
    additional = get_current_vllm_config().additional_config
    if isinstance(additional, dict):
        used = set(additional.get("mergequant_kernels", ()))
        additional["mergequant_kernels"] = sorted(used | {kernel})


def _or_smaller(what: str, unit: int, shard: int) -> str:
    """What else helps where a shard would cut a group, if smaller groups would fit it."""
    if what != "groups" or unit <= STREAM_CODES or shard % STREAM_CODES:
        return ""
    return f", or quantize with groups of {STREAM_CODES} there (--override group_size=...)"

"""vLLM's linear method: creates the stored parameters, has a kernel prepare them, calls it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
)

from mergequant_vllm.format import FormatError, LinearFormat
from mergequant_vllm.kernels.int4_linear.spec import LinearSpec
from mergequant_vllm.kernels.norm_round.reference import static_codes
from mergequant_vllm.kernels.select import select_linear
from mergequant_vllm.kernels.token_quant.reference import token_codes
from mergequant_vllm.packing import codes_per_word, words_per_row


@register_weight_loader_v2_supported_method
class MergeQuantLinearMethod(LinearMethodBase):
    """One linear of the server: one or several of the checkpoint's, merged along their outputs.

    Args:
        prefix: vLLM's name of the module.
        merged: formats of the checkpoint's linears, in the order in which vLLM stacks them.
        kernel: name of the kernel that the user asked for, or None.
    """

    def __init__(self, prefix: str, merged: Sequence[LinearFormat], kernel: str | None) -> None:
        self.prefix = prefix
        self.requested = kernel
        self.parts = len(merged)
        self.format = merged[0]
        for other in merged[1:]:
            if other.activations != self.format.activations or other.norm != self.format.norm:
                raise FormatError(
                    f"The linears that vLLM merges into {prefix!r} read different activations: "
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
        """Register empty parameters in the stored layout; refuses shards that cut words."""
        self._refuse_cut_words(input_size_per_partition, input_size)
        bits = self.format.weight_bits
        words = words_per_row(input_size_per_partition, bits)
        rows = sum(output_partition_sizes)
        loader: Callable[..., None] = extra_weight_attrs["weight_loader"]
        packed = PackedvLLMParameter(
            data=torch.zeros(rows, words, dtype=torch.int32),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=codes_per_word(bits),
            weight_loader=loader,
        )
        layer.register_parameter("weight_packed", packed)
        # NaN until loaded: process_weights_after_loading finds what the loader passed over.
        steps = torch.full((rows, 1), torch.nan, dtype=torch.float32)
        layer.register_parameter(
            "weight_scale",
            ChannelQuantScaleParameter(data=steps, output_dim=0, weight_loader=loader),
        )
        if self.format.activations == "dynamic":
            clips = torch.full((self.parts,), torch.nan, dtype=torch.float32)
            layer.register_parameter(
                "input_clip", PerTensorScaleParameter(data=clips, weight_loader=loader)
            )
        self.spec = LinearSpec(
            in_features=input_size_per_partition,
            out_features=rows,
            weight_bits=bits,
            activation_bits=self.format.activation_bits,
            dynamic=self.format.activations == "dynamic",
            device=packed.device.type,
            dtype=params_dtype,
        )
        self.kernel = select_linear(self.spec, self.requested)
        record_in_compile_cache_key(self.kernel.name)

    def _refuse_cut_words(self, shard: int, whole: int) -> None:
        """vLLM's loader would cut packed words in silence."""
        word = codes_per_word(self.format.weight_bits)
        if shard == whole or shard % word == 0:
            return
        ranks = whole // shard
        fitting = [
            n for n in range(1, ranks) if whole % n == 0 and (n == 1 or whole // n % word == 0)
        ]
        sizes = " or ".join(str(n) for n in fitting)
        raise ValueError(
            f"{self.prefix}: {whole} input channels over {ranks} tensor-parallel ranks are {shard} "
            f"a rank, which is not a whole number of packed words ({word} codes each): "
            f"use --tensor-parallel-size {sizes}."
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Stored layout to the kernel's, once; the stored words are freed if it keeps its own."""
        self._check_loaded(layer)
        weight = self.kernel.prepare(layer.weight_packed.data, self.spec)
        del layer.weight_packed
        layer.register_parameter("kernel_weight", Parameter(weight, requires_grad=False))
        steps = layer.weight_scale.data.reshape(-1).contiguous()
        layer.register_parameter("weight_scale", Parameter(steps, requires_grad=False))
        if self.spec.dynamic:
            clip = layer.input_clip.data[:1].clone()
            layer.register_parameter("input_clip", Parameter(clip, requires_grad=False))

    def _check_loaded(self, layer: Any) -> None:
        if not bool(torch.isfinite(layer.weight_scale.data).all()):
            raise FormatError(
                f"{self.prefix}.weight_scale was not loaded in full or is not finite: "
                "copy the checkpoint again, or quantize the model again."
            )
        if not self.spec.dynamic:
            return
        clips = layer.input_clip.data
        if not bool((clips == clips[0]).all()):
            raise FormatError(
                f"The linears that vLLM merges into {self.prefix!r} have different clip ratios "
                f"{clips.tolist()}, or one was not loaded: quantize the model again."
            )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] in the model's dtype (static: already divided by s) to y [..., N]."""
        bits, code_dtype = self.format.activation_bits, self.kernel.code_dtype
        token_step: Tensor | None = None
        if self.spec.dynamic:
            codes, token_step = token_codes(x, layer.input_clip, bits, code_dtype)
        else:
            codes = static_codes(x, bits, code_dtype)
        return self.kernel.linear(
            codes, layer.kernel_weight, layer.weight_scale, token_step, bias, x.dtype
        )


def record_in_compile_cache_key(kernel: str) -> None:
    """Put the kernel's name where vLLM hashes it, so that no stale graph runs another kernel.

    vLLM's compile-cache key covers its own configuration and traced files, not our environment.
    """
    additional = get_current_vllm_config().additional_config
    if isinstance(additional, dict):
        used = set(additional.get("mergequant_kernels", ()))
        additional["mergequant_kernels"] = sorted(used | {kernel})

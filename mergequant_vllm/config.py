"""vLLM's view of a mergequant checkpoint: validates it and hands each linear its method."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.transformers_utils.config import get_safetensors_params_metadata

from mergequant_vllm.compile_cache import read_compiled_again
from mergequant_vllm.embedding import LookupMethod
from mergequant_vllm.format import (
    BLOCK,
    QUANT_METHOD,
    CheckpointFormat,
    FormatError,
    LinearFormat,
    StoredTensor,
    check_tensors,
    parse,
)
from mergequant_vllm.kernels.selection.linears import requested_kernel
from mergequant_vllm.linear import MergeQuantLinearMethod
from mergequant_vllm.version import unsupported_vllm

logger = init_logger("vllm.mergequant")

# What vLLM's classes merge that do not say so (StableLM).
_USUALLY_MERGED: Mapping[str, Sequence[str]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


class MergeQuantConfig(QuantizationConfig):
    """`quant_method: mergequant` in a checkpoint's `quantization_config`."""

    def __init__(self, checkpoint: CheckpointFormat | None = None) -> None:
        if checkpoint is None:  # vLLM makes it so for a model without a quantization_config
            raise ValueError(
                f"The model is not a {QUANT_METHOD} checkpoint: its config.json has no "
                f"quantization_config. Serve it without --quantization {QUANT_METHOD}, or make a "
                "checkpoint of it with `mergequant quantize`."
            )
        super().__init__()
        self.checkpoint = checkpoint
        self.kernel = requested_kernel()
        read_compiled_again()

    def __repr__(self) -> str:
        return f"MergeQuantConfig({len(self.checkpoint.quantized)} linears)"

    @classmethod
    def get_name(cls) -> str:
        """Name under which vLLM knows the method."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Model dtypes; the stored steps are exact in each."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Compute capability of the oldest NVIDIA GPU with integer tensor cores."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file: the configuration is part of config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MergeQuantConfig":
        """Read `quantization_config`; raises ValueError with one sentence on a bad one."""
        refusal = unsupported_vllm()
        if refusal is not None:
            raise ValueError(refusal)
        return cls(parse(config))

    def maybe_update_config(
        self, model_name: str, *args: object, revision: str | None = None, **kwargs: object
    ) -> None:
        """Compare every tensor's header with the contract before any process is started.

        vLLM calls this with the model's folder or hub id. It does not itself miss a tensor of a
        quantized model that the files lack.
        """
        headers = get_safetensors_params_metadata(model_name, revision=revision)
        if headers:
            check_tensors(self.checkpoint, found_tensors(headers))
        else:
            logger.warning("No safetensors headers of %s to check before loading", model_name)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer; linears outside the contract stay in the model's dtype."""
        refuse_lora()
        refuse_offload()
        if isinstance(layer, ParallelLMHead):
            head = self._linear(prefix) or next(iter(self.checkpoint.outer.values()), None)
            if head is None:
                return None
            return MergeQuantLinearMethod(prefix, [head], self.kernel, or_default=True)
        if isinstance(layer, VocabParallelEmbedding):
            return LookupMethod() if self._has_own_head() else None
        if not isinstance(layer, LinearBase):
            return None
        merged = self._linears_behind(prefix)
        if not merged:
            return UnquantizedLinearMethod()
        return MergeQuantLinearMethod(prefix, merged, self.kernel)

    def _has_own_head(self) -> bool:
        """Whether the head is a tensor of its own, so that no logit comes from the embedding."""
        return any(BLOCK not in name for name in self.checkpoint.linears)

    def _linear(self, name: str) -> LinearFormat | None:
        """A linear of the checkpoint by vLLM's name, which may begin otherwise.

        The draft model of speculative decoding is called `draft_model.model...`; and what a
        checkpoint calls `gpt_neox.layers...` is `model.layers...` in a class of transformers' own.
        """
        while "." in name:
            if name in self.checkpoint.quantized:
                return self.checkpoint.quantized[name]
            name = name.partition(".")[2]
            if name in self._below_the_first:
                return self._below_the_first[name]
        return self.checkpoint.quantized.get(name)

    @cached_property
    def _below_the_first(self) -> dict[str, LinearFormat]:
        """The linears within blocks by their names without the first part."""
        linears = self.checkpoint.quantized
        return {x.partition(".")[2]: linears[x] for x in linears if x.count(".") > 1}

    def _linears_behind(self, prefix: str) -> list[LinearFormat]:
        """The checkpoint's linears that vLLM merges into the module `prefix`, in its order.

        What a checkpoint stores under the module's own name is all of it, also where vLLM's class
        says that it merges others (GLM-4's gate_up_proj).
        """
        parent, _, module = prefix.rpartition(".")
        whole = self._linear(prefix)
        if whole is not None:
            return [whole]
        parts = self.packed_modules_mapping.get(module) or _USUALLY_MERGED.get(module)
        names = [f"{parent}.{part}" for part in parts or [module]]
        known = [linear for name in names if (linear := self._linear(name)) is not None]
        if known and len(known) != len(names):
            raise FormatError(
                f"vLLM merges {', '.join(names)} of {prefix!r} into one linear, and only some of "
                "them are quantized: quantize all of them or none."
            )
        return known


def found_tensors(headers: Mapping[str, Mapping[str, Any]]) -> dict[str, StoredTensor]:
    """safetensors headers, by tensor name, in the contract's terms."""
    return {
        name: StoredTensor(tuple(header["shape"]), header["dtype"])
        for name, header in headers.items()
        if name != "__metadata__"  # free text that some versions of vLLM pass on
    }


def refuse_offload() -> None:
    """Raise ValueError if weights are to be kept in host memory.

    vLLM moves a layer's parameters by name, and ours are gone once a kernel has prepared its own.
    """
    offload = getattr(get_current_vllm_config(), "offload_config", None)
    kept = getattr(getattr(offload, "uva", None), "cpu_offload_gb", 0)
    groups = getattr(getattr(offload, "prefetch", None), "offload_group_size", 0)
    if kept or groups:
        raise ValueError(
            "A mergequant checkpoint cannot be served with weights offloaded to host memory: "
            "serve without --cpu-offload-gb and --offload-group-size, on more GPUs if it must be."
        )


def refuse_lora() -> None:
    """Raise ValueError if LoRA is on.

    An adapter reads its linear's input, which behind a migrated norm is x/s and not x.
    """
    if get_current_vllm_config().lora_config is not None:
        raise ValueError(
            "A mergequant checkpoint cannot be served with --enable-lora: its norms' outputs carry "
            "the activation steps, which LoRA adapters do not know; merge the adapter into the "
            "model before quantizing, and serve without --enable-lora."
        )

"""A mergequant checkpoint in `AutoModelForCausalLM.from_pretrained`: the reference forward.

Without this, transformers does not know the format: it warns, fills the quantized linears with
random numbers, and answers. It is registered by `mergequant.transformers_hook`.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

# Nothing of ours is imported up here, nor its method's name: this module is, while transformers'
# models and what builds upon them cannot be.
METHOD = "mergequant"


class MergeQuantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a checkpoint, as transformers carries it."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class ReferenceQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts modules of the reference forward into the place of a model's quantized linears.

    They compute what the server computes, slowly, in any dtype; they are neither trained nor saved.
    """

    requires_calibration = True  # quantizing is `mergequant quantize`'s

    def __init__(self, quantization_config: MergeQuantConfig, **arguments: Any) -> None:
        from mergequant_vllm.format import parse

        super().__init__(quantization_config, **arguments)
        self.checkpoint = parse(quantization_config.to_dict())
        self.folder: Path | None = None
        self.dtype = torch.float32

    def _process_model_before_weight_loading(
        self, model: Any, dtype: Any = None, checkpoint_files: Any = None, **other: Any
    ) -> None:
        """Take the linears out: what the checkpoint has of them is not transformers' to load."""
        if not checkpoint_files:
            raise ValueError("A mergequant checkpoint is loaded from its folder, by name alone.")
        self.folder = Path(checkpoint_files[0]).parent
        self.dtype = dtype or torch.float32
        names = [_their_name(model, name) for name in self.checkpoint.quantized]
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Module())
        known = set(model._keys_to_ignore_on_load_unexpected or ())
        passed_over = {rf"^{re.escape(name)}\." for name in names}
        model._keys_to_ignore_on_load_unexpected = known | passed_over

    def _process_model_after_weight_loading(self, model: Any, **other: Any) -> Any:
        """Put the reference modules in."""
        from mergequant.evaluate.reference_forward import served_module
        from mergequant.model.reader import Reader
        from mergequant_vllm.format import check_tensors

        assert self.folder is not None
        reader = Reader(self.folder)
        check_tensors(self.checkpoint, reader.headers)
        device = model.get_input_embeddings().weight.device
        for name, linear in self.checkpoint.quantized.items():
            parent, _, child = _their_name(model, name).rpartition(".")
            module = served_module(reader, name, linear, self.dtype).to(device)
            setattr(model.get_submodule(parent), child, module)
        return model

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` works: the folder that was loaded is the checkpoint."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether gradients go through it: codes have none."""
        return False


def _their_name(model: Any, name: str) -> str:
    """A linear's name in `model` for that in the checkpoint."""
    from mergequant.model.architectures import find

    return find(model.config.model_type).in_transformers(name)


def register() -> None:
    """Make transformers know `quant_method: mergequant`; idempotent."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(MergeQuantConfig)
        register_quantizer(METHOD)(ReferenceQuantizer)

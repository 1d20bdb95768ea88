"""A vLLM engine in this process, on a model of random weights. Imported by child processes only."""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.served_variants import Variant, find_variant, write_checkpoint
from benchmarks.common.shapes import MODELS

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the profiler and the loader are of this process
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
}


def start(
    name: str, model: str, scratch: Path, *, blocks: int, context: int, **arguments: Any
) -> Any:
    """Start a `vllm.LLM` for variant `name` and the model called `model` in `common.shapes`.

    `arguments` and settings that this version of vLLM does not know are left out.
    """
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    variant, kernel = find_variant(name)
    if kernel is not None:
        os.environ["MERGEQUANT_KERNEL"] = kernel
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    import mergequant_vllm

    mergequant_vllm.register()  # an installed plugin is found by itself; a checkout is not
    register_random_loader(variant)
    folder = write_checkpoint(scratch / "model", name, MODELS[model], blocks, context)
    wanted = {
        "dtype": "bfloat16",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": context,
        "enable_prefix_caching": False,
        "seed": 0,
        "kernel_config": _kernel_config(),
        **variant.engine,
        **arguments,
    }
    if torch.cuda.is_available() and wanted.get("attention_backend") is None:
        wanted["attention_backend"] = default_attention()
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    kept = {key: value for key, value in wanted.items() if key in known and value is not None}
    return LLM(model=str(folder), **kept)


def default_attention() -> str | None:
    """Triton's where vLLM came without its FlashAttention libraries; else vLLM's own choice."""
    spec = importlib.util.find_spec("vllm.vllm_flash_attn")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    has_flash_attention = any(list(place.glob("_vllm_fa*_C*.so")) for place in places)
    return None if has_flash_attention else "TRITON_ATTN"


def _kernel_config() -> dict[str, bool] | None:
    """Settings without warm-ups of libraries that are missing; None where vLLM has none."""
    try:
        from vllm.config import KernelConfig
    except ImportError:
        return None
    known = {field.name for field in dataclasses.fields(KernelConfig)}
    needs = {"enable_flashinfer_autotune": "flashinfer", "enable_cutedsl_warmup": "cutlass"}
    missing = {key for key, module in needs.items() if importlib.util.find_spec(module) is None}
    return dict.fromkeys(missing & known, False) or None


def register_random_loader(variant: Variant) -> None:
    """Make `load_format="dummy"` draw all weights at random.

    vLLM's own leaves integer weights as they are allocated, often zero, on which products run
    faster than on data, and draws tiny norms, which round to codes 0.
    """
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    class RandomLoader(DummyModelLoader):  # type: ignore[misc]
        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            super().load_weights(model, model_config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    randomize(name, parameter.data, variant)

    register_model_loader("dummy")(RandomLoader)


def randomize(name: str, data: torch.Tensor, variant: Variant) -> None:
    """Overwrite one parameter: weights at random, steps and norms with plausible constants."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("weight_packed", "qweight"):
        data.random_(-(2**31), 2**31)
    elif leaf == "weight_scale":
        data.fill_(variant.weight_step)
    elif leaf == "input_clip":
        data.fill_(0.9)
    elif leaf == "weight" and "norm" in name:
        data.fill_(variant.norm if name.endswith(("layernorm.weight",)) else 1.0)
    elif leaf == "weight" and data.dtype is torch.int8:
        data.random_(-128, 128)
    elif leaf == "weight" and data.dtype is torch.float8_e4m3fn:
        data.copy_(torch.randn(data.shape, device=data.device, dtype=torch.bfloat16))
    elif leaf == "weight":
        data.normal_(std=0.02)


def prompts(batch: int, length: int, vocabulary: int, seed: int) -> list[dict[str, list[int]]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocabulary, (batch, length), generator=generator)
    return [{"prompt_token_ids": row} for row in ids.tolist()]


def generate(llm: Any, inputs: Sequence[Any], tokens: int) -> int:
    """Let every sequence write exactly `tokens` tokens; returns how many came."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate(list(inputs), sampling, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def linear_kernels(llm: Any) -> dict[str, str]:
    """Names of the kernels that run each linear of the first block, and a quantized head."""

    def list_kernels(model: nn.Module) -> dict[str, str]:
        kernels = {}
        for name, module in model.named_modules():
            quant_method = getattr(module, "quant_method", None)
            linear = ".layers.0." in f".{name}" and name.endswith("proj")
            head = name.endswith("lm_head") and hasattr(module, "product")
            if (linear or head) and quant_method is not None:
                scheme = getattr(module, "scheme", quant_method)
                kernel = getattr(scheme, "kernel", getattr(scheme, "fp8_linear", scheme))
                kernels[name.rsplit(".", 1)[-1]] = getattr(kernel, "name", type(kernel).__name__)
        return kernels

    result: dict[str, str] = llm.apply_model(list_kernels)[0]
    return result


def model_bytes(llm: Any) -> int:
    """Bytes of all parameters and buffers, each storage once."""

    def sum_bytes(model: nn.Module) -> int:
        tensors = [*model.parameters(), *model.buffers()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    return int(llm.apply_model(sum_bytes)[0])

"""Ways to serve one model, as folders with a config.json and no tensors: weights are random.

`mergequant` is ours with the default kernels, `mergequant-head16` leaves the head in the model's
dtype, `mergequant-w8a8` has 8 bits, `mergequant-w8a8-static` no step per token in its blocks;
`mergequant:KERNEL` asks for a kernel by name, which may refuse the head. Any name may end
in `+fp8-cache`: keys and values in 8 bits.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks.common.shapes import Model
from mergequant.quantizer.forms import CARRIED_GROUP
from mergequant_vllm.format import (
    BLOCK,
    FORMAT_VERSION,
    CheckpointFormat,
    DynamicInput,
    LinearEntry,
    LinearForm,
    Provenance,
    StaticInput,
    Target,
    WeightForm,
)

Config = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A way to quantize and serve a model.

    Attributes:
        quantization: from the model and its number of blocks to `quantization_config`, or None.
        weight_step: what stored integer or FP8 weights are multiplied with; the plugin's dummy
            weights have steps of their own.
        norm: the norms' multiplier; ours carries 1/s and reaches over the range of codes.
        engine: arguments for vLLM's engine.
    """

    quantization: Callable[[Model, int], Config] | None = None
    weight_step: float = 1.0
    norm: float = 1.0
    engine: Mapping[str, Any] = field(default_factory=dict)


def _mergequant(
    model: Model,
    blocks: int,
    head: bool = True,
    bits: Literal[4, 8] = 4,
    fully_static: bool = False,
) -> Config:
    """Our format.

    Args:
        head: in 8 bits, as the quantizer writes it by default.
        bits: of weights and activations in the blocks.
        fully_static: o and down have static inputs too, down's weights groups.
    """
    hidden, inner = model.hidden_size, model.intermediate_size
    static = {
        "self_attn.q_proj": (model.query_size, hidden, "input_layernorm"),
        "self_attn.k_proj": (model.key_value_size, hidden, "input_layernorm"),
        "self_attn.v_proj": (model.key_value_size, hidden, "input_layernorm"),
        "mlp.gate_proj": (inner, hidden, "post_attention_layernorm"),
        "mlp.up_proj": (inner, hidden, "post_attention_layernorm"),
    }
    block = f"model.layers.{BLOCK}"
    linears = {
        f"{block}.{name}": LinearEntry(shape=(n, k), norm=f"{block}.{norm}")
        for name, (n, k, norm) in static.items()
    }
    dynamic = {"self_attn.o_proj": (hidden, model.query_size), "mlp.down_proj": (hidden, inner)}
    linears |= {f"{block}.{name}": LinearEntry(shape=shape) for name, shape in dynamic.items()}
    weight, steps = WeightForm(bits=bits), StaticInput(bits=bits)
    normed = LinearForm(weight=weight, input=steps)
    o = down = LinearForm(weight=weight, input=DynamicInput(bits=bits))
    if fully_static:
        o = normed
        down = LinearForm(weight=WeightForm(bits=bits, group_size=CARRIED_GROUP), input=steps)
    targets = [
        Target(pattern=r"re:.*\.(q|k|v|gate|up)_proj$", linear=normed),
        Target(pattern=r"re:.*\.o_proj$", linear=o),
        Target(pattern=r"re:.*\.down_proj$", linear=down),
    ]
    if head:
        linears["lm_head"] = LinearEntry(shape=(model.vocab_size, hidden))
        eight = LinearForm(weight=WeightForm(bits=8), input=DynamicInput(bits=8))
        targets.append(Target(pattern="lm_head", linear=eight))
    checkpoint = CheckpointFormat(
        quant_method="mergequant",
        format_version=FORMAT_VERSION,
        block=block,
        blocks=blocks,
        targets=targets,
        linears=linears,
        tensors={},
        provenance=Provenance(options={}, versions={}, calibration_sha256=""),
    )
    config: Config = checkpoint.model_dump(mode="json")
    return config


def _compressed_tensors(
    form: str, weights: Config, activations: Config | None
) -> Callable[[Model, int], Config]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    return lambda model, blocks: config


def _arguments(bits: int, kind: str, strategy: str, **more: Any) -> Config:
    required = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy}
    return {**required, "dynamic": False, **more}


VARIANTS = {
    "bf16": Variant(),
    "marlin-w4a16": Variant(
        _compressed_tensors("pack-quantized", _arguments(4, "int", "group", group_size=128), None),
        weight_step=0.004,
        engine={"linear_backend": "marlin"},  # on Hopper vLLM itself would choose Machete
    ),
    "w4a16": Variant(  # with the kernel that vLLM chooses
        _compressed_tensors("pack-quantized", _arguments(4, "int", "group", group_size=128), None),
        weight_step=0.004,
    ),
    "int8": Variant(
        _compressed_tensors(
            "int-quantized",
            _arguments(8, "int", "channel"),
            _arguments(8, "int", "token", dynamic=True),
        ),
        weight_step=0.0003,
    ),
    "fp8": Variant(
        _compressed_tensors(
            "float-quantized",
            _arguments(8, "float", "channel"),
            _arguments(8, "float", "token", dynamic=True),
        ),
        weight_step=0.02,
    ),
    "mergequant": Variant(_mergequant, weight_step=0.004, norm=2.0),
    "mergequant-head16": Variant(partial(_mergequant, head=False), norm=2.0),
    "mergequant-w8a8": Variant(partial(_mergequant, bits=8), norm=30.0),
    "mergequant-w8a8-static": Variant(partial(_mergequant, bits=8, fully_static=True), norm=30.0),
}


FP8_CACHE = "+fp8-cache"


def base_name(name: str) -> str:
    """Name of the variant alone, without a kernel or a cache."""
    return name.removesuffix(FP8_CACHE).partition(":")[0]


def find_variant(name: str) -> tuple[Variant, str | None]:
    """The variant called `name` and, after a colon, the kernel asked for.

    Raises:
        ValueError: there is no such variant.
    """
    base, _, kernel = name.removesuffix(FP8_CACHE).partition(":")
    if base not in VARIANTS or (kernel and not base.startswith("mergequant")):
        known = ", ".join(VARIANTS)
        raise ValueError(f"{name!r} is no variant: choose from {known}, mergequant:KERNEL")
    variant = VARIANTS[base]
    if name.endswith(FP8_CACHE):
        variant = replace(variant, engine={**variant.engine, "kv_cache_dtype": "fp8"})
    return variant, kernel or None


def write_checkpoint(folder: Path, name: str, model: Model, blocks: int, context: int) -> Path:
    """A folder that vLLM loads with `load_format="dummy"`."""
    variant, _ = find_variant(name)
    config = model.config(context, blocks)
    if variant.quantization is not None:
        config["quantization_config"] = variant.quantization(model, blocks)
        if "lm_head" in config["quantization_config"].get("linears", {}):
            config["tie_word_embeddings"] = False
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder

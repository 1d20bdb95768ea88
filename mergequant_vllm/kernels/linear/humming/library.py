"""humming-kernels as we speak to it: one linear in the layout that the library takes.

What the library takes (its own checks; the same from 0.1.10 in vLLM 0.26 to 0.1.19 in 0.33):

* weight int32 [N, K * bits / 32]: codes + 2^(bits - 1), lowest bits first, a tight stream at every
  width; a row is a whole number of words: K a multiple of 32. This is our stored layout.
  For `NIBBLES` the columns are in `nibble_order`, as the library sees them in the bytes.
* weight_scale [N, 1] or [N, K / group] in the model's dtype, float16 or bfloat16.
* zero_point int32 [N * bits / 32, groups]: as the weight's codes, packed along N (N a multiple of
  32). Not where weights are as wide as activations; with one group only from 0.1.17 on.
* bias [N] in the model's dtype, to which the reference's constant is rounded. N is a multiple of 8.
* codes uint8 [M, K / 2], two's complement, even columns in the low nibble, or int8 [M, K]; and
  input_scale float32 [M, 1], or [1] if the layer is static (a mode of 0.1.14 and later).

It pads N to 256 and K to 128 (or the group) itself, and returns N unpadded. Groups are powers of
two: with others its loader of scales would read the wrong ones, unnoticed. It scales the sums of
groups in float32 as long as its schema has no `weight_scale_group_size_n`, which is left at 0.
INT4 has no groups here: the two nibbles of a byte are channels far apart, of different groups.

The library's own modules are used, not vLLM's facade: that exports other names in 0.31 and in 0.32.
"""

import contextlib
import dataclasses
import importlib
import json
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn

from mergequant_vllm.kernels.codes import CodeLayout, nibble_order
from mergequant_vllm.kernels.linear.spec import LinearSpec, StoredLinear
from mergequant_vllm.packing import pack, unpack

COLUMNS = 32  # codes after which a row of any width is at a word's border
OUTPUTS = 8
OUTPUTS_WITH_ZERO_POINTS = 32
PADDED_OUTPUTS = 256  # the two paddings are vLLM's own choice
PADDED_COLUMNS = 128


def library(module: str) -> Any:
    """A module of humming, imported when it is first needed."""
    return importlib.import_module(f"humming.{module}")


def code_bits(layout: CodeLayout) -> int:
    """Width of an activation code as the kernel multiplies it."""
    return 4 if layout is CodeLayout.NIBBLES else 8


def padded_columns(spec: LinearSpec) -> int:
    """K padded to whole words and whole groups."""
    multiple = COLUMNS if spec.groups == 1 else max(COLUMNS, spec.group_size or 0)
    return -(-spec.in_features // multiple) * multiple


def library_tensors(
    stored: StoredLinear,
    spec: LinearSpec,
    layout: CodeLayout,
    shift: int,
    constant: Tensor | None,
) -> dict[str, Tensor]:
    """What the library transforms; see the module's docstring. N and K are padded with codes 0.

    Args:
        stored: the linear.
        spec: its spec.
        layout: of the activation codes.
        shift: weight steps are multiplied by 2^shift.
        constant: float32 [N], what the bias is to be, or None.

    Returns:
        `weight`, `weight_scale`, and if there are any `zero_point` and `bias`.
    """
    bits, columns = spec.weight_bits, padded_columns(spec)
    multiple = OUTPUTS if stored.zero_points is None else OUTPUTS_WITH_ZERO_POINTS
    more = -spec.out_features % multiple
    weight = stored.weight_packed
    if columns != spec.in_features or more or layout is CodeLayout.NIBBLES:
        codes = unpack(weight, bits, spec.in_features)
        codes = F.pad(codes, (0, columns - spec.in_features, 0, more))
        if layout is CodeLayout.NIBBLES:
            codes = codes[:, nibble_order(columns).to(codes.device)]
        weight = pack(codes.contiguous(), bits)
    step = (stored.weight_step * 2.0**shift).to(spec.dtype)
    tensors = {"weight": weight.contiguous(), "weight_scale": F.pad(step, (0, 0, 0, more))}
    if stored.zero_points is not None:
        zeros = F.pad(stored.zero_points, (0, 0, 0, more))
        tensors["zero_point"] = pack(zeros.T.contiguous(), bits).T.contiguous()
    if constant is not None:
        tensors["bias"] = F.pad(constant.to(spec.dtype), (0, more))
    return tensors


def transform(
    tensors: dict[str, Tensor], spec: LinearSpec, layout: CodeLayout
) -> tuple[str, dict[str, Tensor]]:
    """The library's layer configuration, as JSON, and its own layout of `tensors`."""
    schema = library("schema")
    group = 0 if spec.groups == 1 else spec.group_size or 0
    inputs: dict[str, object] = {"a_dtype": f"int{code_bits(layout)}"}
    if "input_quant_mode" in {each.name for each in dataclasses.fields(schema.HummingInputSchema)}:
        inputs["input_quant_mode"] = "dynamic_token" if spec.dynamic else "static_tensor"
    weight = tensors["weight"]
    arguments: dict[str, Any] = {
        "shape_n": weight.shape[0],
        "shape_k": padded_columns(spec),
        "weight_schema": schema.HummingWeightSchema(
            b_dtype=f"uint{spec.weight_bits}",
            weight_scale_group_size=group,
            has_zero_point=spec.zero_points,
        ),
        "input_schema": schema.HummingInputSchema(**inputs),
        "pad_n_to_multiple": PADDED_OUTPUTS,
        "pad_k_to_multiple": max(PADDED_COLUMNS, group),
        "has_bias": "bias" in tensors,
        "torch_dtype": spec.dtype,
    }
    with on_device(weight.device):
        config, transformed = _transform(tensors, arguments, weight.device)
    _refuse_replaced(config, code_bits(layout), group)
    return config, transformed


def _transform(
    tensors: dict[str, Tensor], arguments: dict[str, Any], device: torch.device
) -> tuple[str, dict[str, Tensor]]:
    if Version(importlib.import_module("humming").__version__) >= Version("0.1.17"):
        prepare = library("transform").prepare_and_transform_humming_tensors
        config, transformed = prepare(tensors, device=device, **arguments)
        return config.to_str(), transformed
    method = library("layer").HummingMethod
    layer = nn.Module()
    for name, tensor in tensors.items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    meta = method.prepare_layer_meta(layer=layer, **arguments)
    method.transform_humming_layer(layer)
    return meta.to_str(), {name: param.data for name, param in layer.named_parameters()}


def _refuse_replaced(config: str, bits: int, group: int) -> None:
    """Raise RuntimeError if the library configured something else than it was asked for."""
    chosen = json.loads(config)
    asked = {
        "a_dtype": f"int{bits}",
        "weight_scale_group_size": group,
        "use_int_weight_scale": False,
    }
    configured = {name: chosen[name] for name in asked}
    if configured != asked:
        raise RuntimeError(f"humming configured {configured} where {asked} was asked for")


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """`device` as the current CUDA device, if it is one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

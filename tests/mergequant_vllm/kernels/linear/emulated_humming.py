"""humming-kernels as its source documents it: signatures, checks and layouts; no GPU.

Each version's functions have that version's own signatures. What they are handed is checked as the
library checks it, decoded bit by bit from the documented layouts, multiplied in 64-bit integers and
rounded by `humming.rounding`.
"""

import inspect
import json
import sys
import types
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mergequant_vllm.kernels.linear.humming.rounding import emulate_epilogue, emulate_group_epilogue

# 0.1.10: vLLM 0.26 and 0.27; 0.1.12: 0.28; 0.1.16: 0.31; 0.1.17: 0.32; 0.1.19: 0.33.
VERSIONS = ("0.1.10", "0.1.12", "0.1.16", "0.1.17", "0.1.19")

# Ranges of M, exclusive and inclusive border, with a kernel's number and its multiprocessors.
RANGES = [[0, 16, 70, 8], [16, 48, 71, 8], [48, 64, 70, 9], [64, 2**30, 72, 9]]

_WEIGHT_SCHEMA = {
    "b_dtype": ...,
    "bs_dtype": None,
    "weight_scale_group_size": 0,
    "weight_scale_group_size_n": 0,
    "weight_scale_type": None,
    "has_zero_point": False,
    "is_fp_zero_point": False,
    "hadamard_block_size": 0,
}
_INPUT_SCHEMA: dict[str, Any] = {"a_dtype": None, "input_scale_group_size": 0}


def read_bits(words: Tensor, bits: int) -> Tensor:
    """Unsigned codes, int64 [rows, codes], of int32 [rows, words]: a stream, low bits first."""
    octets = words.contiguous().numpy().view(np.uint8)
    stream = np.unpackbits(octets, axis=-1, bitorder="little")
    codes = stream.reshape(words.shape[0], -1, bits) @ (1 << np.arange(bits))
    return torch.from_numpy(codes.astype(np.int64))


def up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass
class Emulated:
    """The library as one test sees it.

    Attributes:
        handed: tensors given for transformation, by name.
        launches: arguments of the products, in order.
        lies: entries that the layer's configuration shows instead of what was asked for.
    """

    version: str
    folder: Path
    handed: dict[str, Tensor] = field(default_factory=dict)
    launches: list[dict[str, Any]] = field(default_factory=list)
    lies: dict[str, object] = field(default_factory=dict)


class Config:
    """The library's LayerConfig, as far as anything here reads it."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def to_str(self) -> str:
        return json.dumps(self.values)


def _configure(emulated: Emulated, arguments: dict[str, Any]) -> Config:
    weight, inputs = arguments["weight_schema"], arguments["input_schema"]
    n, k = arguments["shape_n"], arguments["shape_k"]
    padded_n = up(n, arguments["pad_n_to_multiple"])
    padded_k = up(k, arguments["pad_k_to_multiple"])
    bits, group = int(weight.b_dtype[4:]), weight.weight_scale_group_size
    code_bits = int(inputs.a_dtype[3:])
    assert padded_n % 64 == 0 and padded_k % (2 * 256 // code_bits) == 0
    assert (padded_n - n) % 8 == 0 and (padded_k - k) % (128 // code_bits) == 0
    assert bits <= code_bits and (bits < code_bits or not weight.has_zero_point)
    assert weight.b_dtype.startswith("uint") and inputs.a_dtype.startswith("int")
    assert group == 0 or (group >= 256 // code_bits and padded_k % group == 0 and k % group == 0)
    grouped_zeros = emulated.version in ("0.1.12", "0.1.16")
    assert not (grouped_zeros and weight.has_zero_point and group == 0)
    assert arguments["torch_dtype"] in (torch.float16, torch.bfloat16)
    values = {
        "shape_n": padded_n,
        "shape_k": padded_k,
        "pad_shape_n": padded_n - n,
        "pad_shape_k": padded_k - k,
        "a_dtype": inputs.a_dtype,
        "b_dtype": weight.b_dtype,
        "c_dtype": str(arguments["torch_dtype"]).removeprefix("torch."),
        "weight_scale_group_size": group,
        "use_int_weight_scale": weight.weight_scale_group_size_n == 1 and group > 0,
        "has_zero_point": weight.has_zero_point,
        "has_bias": arguments["has_bias"],
    }
    if hasattr(inputs, "input_quant_mode"):
        values["input_quant_mode"] = inputs.input_quant_mode or "dynamic_token"
    return Config({**values, **emulated.lies})


def _transform(emulated: Emulated, config: Config, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Checks as `validate_tensors` does; the fake's own layout is the transposed one."""
    values = config.values
    emulated.handed = {name: tensor.clone() for name, tensor in tensors.items()}
    bits = int(values["b_dtype"][4:])
    n, k = values["shape_n"] - values["pad_shape_n"], values["shape_k"] - values["pad_shape_k"]
    groups = k // (values["weight_scale_group_size"] or k)
    model = getattr(torch, values["c_dtype"])
    documented = {
        "weight": ((n, k * bits // 32), torch.int32),
        "weight_scale": ((n, groups), model),
        "zero_point": ((n * bits // 32, groups), torch.int32),
        "bias": ((n,), model),
    }
    absent = {"zero_point": values["has_zero_point"], "bias": values["has_bias"]}
    expected = {name: form for name, form in documented.items() if absent.get(name, True)}
    assert tensors.keys() == expected.keys()
    for name, (shape, dtype) in expected.items():
        assert tuple(tensors[name].shape) == shape and tensors[name].dtype == dtype, name
        assert tensors[name].is_contiguous()
    return {
        name: tensor.T.contiguous() if tensor.dim() == 2 else tensor.clone()
        for name, tensor in tensors.items()
    }


def _multiply(emulated: Emulated, arguments: dict[str, Any]) -> Tensor:
    emulated.launches.append(arguments)
    values = json.loads(arguments["layer_config"])
    compute = json.loads(arguments["compute_config"])
    assert compute["gemm_type"] == "dense" and compute["use_f16_accum"] is False
    assert arguments["tuning_config"] is None and arguments.get("input_scale_2") is None
    assert compute["use_batch_invariant"] is (arguments["locks"] is None)
    bits, code_bits = int(values["b_dtype"][4:]), int(values["a_dtype"][3:])
    k = values["shape_k"] - values["pad_shape_k"]
    x = _codes(arguments["inputs"], code_bits, k)
    scale = arguments["input_scale"]
    static = values.get("input_quant_mode") == "static_tensor"
    assert scale.dtype == torch.float32 and scale.is_contiguous()
    assert tuple(scale.shape) == ((1,) if static else (x.shape[0], 1))
    w = read_bits(arguments["weight"].T, bits)
    group = values["weight_scale_group_size"] or k
    zeros = torch.full((1, w.shape[0]), 2 ** (bits - 1))
    assert (arguments["zero_point"] is None) is not values["has_zero_point"]
    if values["has_zero_point"]:
        zeros = read_bits(arguments["zero_point"], bits)
    w = w - zeros.T.repeat_interleave(k // zeros.shape[0], dim=1)
    assert (arguments["bias"] is None) is not values["has_bias"]
    weight_scale = arguments["weight_scale"].T
    if group == k:
        return emulate_epilogue(x @ w.T, weight_scale[:, 0], scale, arguments["bias"])
    assert code_bits == 8
    run = min(group, 64)
    sums = [x[:, at : at + run] @ w[:, at : at + run].T for at in range(0, k, run)]
    steps = weight_scale.repeat_interleave(group // run, dim=1)
    return emulate_group_epilogue(sums, steps, scale, arguments["bias"])


def _codes(inputs: Tensor, code_bits: int, k: int) -> Tensor:
    """int64 [M, K]."""
    assert inputs.is_contiguous() and inputs.dim() == 2
    if code_bits == 8:
        assert inputs.dtype == torch.int8 and inputs.shape[1] == k
        return inputs.to(torch.int64)
    assert inputs.dtype == torch.uint8 and inputs.shape[1] * 2 == k
    unsigned = torch.from_numpy(inputs.numpy()).to(torch.int64)
    pairs = torch.stack((unsigned % 16, unsigned // 16), dim=-1).flatten(1)
    return torch.where(pairs < 8, pairs, pairs - 16)


def _schemas(version: str) -> types.ModuleType:
    weight, inputs = dict(_WEIGHT_SCHEMA), dict(_INPUT_SCHEMA)
    if version != "0.1.10":
        weight["weight_scale_2_type"] = None
        inputs["input_scale_dtype"] = None
    if version not in ("0.1.10", "0.1.12"):
        inputs["input_quant_mode"] = None
    module = types.ModuleType("humming.schema")
    for name, fields in (("HummingWeightSchema", weight), ("HummingInputSchema", inputs)):
        defaults = [
            (key, Any) if value is ... else (key, Any, field(default=value))
            for key, value in fields.items()
        ]
        setattr(module, name, make_dataclass(name, defaults, kw_only=True))
    return module


def _functions(emulated: Emulated) -> dict[str, Any]:
    """0.1.17 and later."""

    def prepare_and_transform_humming_tensors(
        tensors: dict[str, Tensor],
        shape_n: int,
        shape_k: int,
        weight_schema: Any,
        input_schema: Any = None,
        num_experts: int | None = None,
        pad_n_to_multiple: int = 1,
        pad_k_to_multiple: int = 1,
        has_bias: bool = False,
        torch_dtype: torch.dtype | None = None,
        device: int | torch.device | None = None,
    ) -> tuple[Config, dict[str, Tensor]]:
        config = _configure(emulated, locals())
        return config, _transform(emulated, config, tensors)

    return {"prepare_and_transform_humming_tensors": prepare_and_transform_humming_tensors}


def _method(emulated: Emulated) -> type:
    """0.1.10 to 0.1.16."""

    class HummingMethod:
        @classmethod
        def prepare_layer_meta(
            cls,
            layer: nn.Module,
            shape_n: int,
            shape_k: int,
            weight_schema: Any,
            input_schema: Any = None,
            num_experts: int | None = None,
            pad_n_to_multiple: int = 1,
            pad_k_to_multiple: int = 1,
            has_bias: bool = False,
            torch_dtype: torch.dtype | None = None,
            sublayer_name: str = "",
        ) -> Config:
            layer.config = _configure(emulated, locals())  # type: ignore[assignment]
            return layer.config  # type: ignore[return-value]

        @classmethod
        def transform_humming_layer(
            cls, layer: nn.Module, sublayer_name: str = "", already_padded: bool = False
        ) -> None:
            config: Any = layer.config
            for name, tensor in _transform(emulated, config, layer.state_dict()).items():
                setattr(layer, name, nn.Parameter(tensor, requires_grad=False))

    return HummingMethod


def _gemm(emulated: Emulated) -> Any:
    def first(
        layer_config: str,
        compute_config: str | None,
        tuning_config: str | None,
        inputs: Tensor,
        weight: Tensor,
        outputs: Tensor | None = None,
        input_scale: Tensor | None = None,
        weight_scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        bias: Tensor | None = None,
        global_scale: Tensor | None = None,
        sorted_ids: Tensor | None = None,
        expert_ids: Tensor | None = None,
        num_tokens_padded: Tensor | None = None,
        expert_layout: Tensor | None = None,
        locks: Tensor | None = None,
        top_k: int = 1,
        valid_shape_m: int = 0,
    ) -> Tensor:
        return _multiply(emulated, dict(locals()))

    def later(
        *,
        layer_config: str,
        inputs: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        weight_scale_2: Tensor | None = None,
        compute_config: str | None = None,
        tuning_config: str | None = None,
        input_scale: Tensor | None = None,
        input_scale_2: Tensor | None = None,
        zero_point: Tensor | None = None,
        bias: Tensor | None = None,
        outputs: Tensor | None = None,
        sorted_ids: Tensor | None = None,
        expert_ids: Tensor | None = None,
        num_tokens_padded: Tensor | None = None,
        expert_layout: Tensor | None = None,
        locks: Tensor | None = None,
        top_k: int = 1,
        valid_shape_m: int = 0,
    ) -> Tensor:
        return _multiply(emulated, dict(locals()))

    if emulated.version == "0.1.12":
        whole = inspect.signature(later)
        kept = [each for each in whole.parameters.values() if each.name != "input_scale_2"]
        later.__signature__ = whole.replace(parameters=kept)  # type: ignore[attr-defined]
    return first if emulated.version == "0.1.10" else later


def _kernels(emulated: Emulated) -> type:
    class HummingKernel:
        @classmethod
        def prepare_kernels(
            cls,
            layer_config: str | dict[str, Any],
            compute_config: str | dict[str, Any] | None = None,
            tuning_config: str | dict[str, Any] | None = None,
            *device: int | torch.device | None,
        ) -> Tensor:
            assert not device, "before 0.1.14 there is no such argument"
            return torch.tensor(RANGES, dtype=torch.int64).flatten()

    return HummingKernel


def install(monkeypatch: pytest.MonkeyPatch, version: str, folder: Path) -> Emulated:
    """Put the emulation where `import humming` finds it."""
    emulated = Emulated(version, folder)
    humming = types.ModuleType("humming")
    humming.__version__ = version  # type: ignore[attr-defined]
    modules = {"humming": humming, "humming.schema": _schemas(version)}
    attributes: dict[str, dict[str, Any]] = {
        "humming.ops": {"humming_gemm": _gemm(emulated)},
        "humming.kernel.humming": {"HummingKernel": _kernels(emulated)},
        "humming.utils.jit": {"get_humming_lock_filename": lambda name: str(folder / name)},
    }
    if version in ("0.1.17", "0.1.19"):
        attributes["humming.transform"] = _functions(emulated)
    else:
        attributes["humming.layer"] = {"HummingMethod": _method(emulated)}
    for name, contents in attributes.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(contents)
    for name in ("humming.kernel", "humming.utils"):
        modules[name] = types.ModuleType(name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return emulated

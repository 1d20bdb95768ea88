"""The Humming library as it is installed is what the emulation says; skipped where it is not."""

import dataclasses
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from mergequant_vllm.kernels.linear.humming import library as humming_library
from mergequant_vllm.kernels.linear.humming.library import library_tensors, padded_columns
from tests.mergequant_vllm.kernels.linear.emulated_humming import VERSIONS, install, read_bits
from tests.mergequant_vllm.kernels.linear.humming_cases import (
    FORMS,
    IDS,
    INT4,
    Kernel,
    gpu_spec,
    in_order,
)
from tests.mergequant_vllm.kernels.made import make_linear


def real_library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The installed library, without the build that importing it starts in the background."""
    monkeypatch.setenv("HUMMING_DISABLE_PARALLEL_BUILD", "1")
    return pytest.importorskip("humming", reason="humming-kernels is not installed")


def signatures() -> dict[str, list[str]]:
    """Parameters of what is called, and fields of the schemas, of the `humming` to be imported."""
    schema = humming_library.library("schema")
    arguments = {
        name: sorted(each.name for each in dataclasses.fields(getattr(schema, name)))
        for name in ("HummingWeightSchema", "HummingInputSchema")
    }
    functions = {"gemm": humming_library.library("ops").humming_gemm}
    if Version(importlib.import_module("humming").__version__) >= Version("0.1.17"):
        functions["prepare"] = humming_library.library(
            "transform"
        ).prepare_and_transform_humming_tensors
    else:
        method = humming_library.library("layer").HummingMethod
        functions["meta"] = method.prepare_layer_meta
        functions["transform"] = method.transform_humming_layer
    for name, function in functions.items():
        arguments[name] = parameters(function)
    return {
        name: [each for each in names if each != "quant_method"]
        for name, names in arguments.items()
    }


def parameters(function: Any) -> list[str]:
    """Names, of a function or of an operation registered with PyTorch."""
    if isinstance(function, torch._ops.OpOverloadPacket):
        return [argument.name for argument in function.default._schema.arguments]
    return list(inspect.signature(function).parameters)


def test_the_installed_library_has_the_emulated_signatures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version = real_library(monkeypatch).__version__
    if version not in VERSIONS:
        pytest.skip(f"there is no emulation of humming-kernels {version}")
    real = signatures()
    kernels = humming_library.library("kernel.humming").HummingKernel
    assert parameters(kernels.prepare_kernels)[:3] == [
        "layer_config",
        "compute_config",
        "tuning_config",
    ]
    install(monkeypatch, version, tmp_path)
    assert signatures() == real


@pytest.mark.parametrize(("kernel", "form"), FORMS, ids=IDS)
def test_the_installed_library_documents_the_layouts(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, form: dict[str, object]
) -> None:
    real_library(monkeypatch)
    spec = gpu_spec(in_features=300, out_features=43, **form)
    if (reason := kernel.refusal(spec)) is not None:
        pytest.skip(reason)
    stored = make_linear(spec, bias=True).stored
    tensors = library_tensors(stored, spec, kernel.layout, 0, stored.constant(True))
    schema = humming_library.library("schema").HummingWeightSchema(
        b_dtype=f"uint{spec.weight_bits}",
        weight_scale_group_size=0 if spec.groups == 1 else spec.group_size,
        has_zero_point=spec.zero_points,
    )
    documented = schema.get_tensors_attrs(
        shape_n=tensors["weight"].shape[0],
        shape_k=padded_columns(spec),
        param_dtype=spec.dtype,
        has_bias=True,
    )
    assert documented.keys() == tensors.keys()
    for name, form_ in documented.items():
        assert tuple(tensors[name].shape) == form_["shape"]
        assert tensors[name].dtype == form_["dtype"]


class StandIn:
    """What the library asks of a GPU before it compiles anything."""

    sm_version, sm_major, sm_minor, is_ppu = 80, 8, 0, False


def test_the_installed_library_reads_the_weights_as_they_are_meant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if Version(real_library(monkeypatch).__version__) < Version("0.1.17"):
        pytest.skip("this version transforms on a GPU only")
    monkeypatch.setattr("humming.transform.DeviceInfo", lambda device: StandIn)
    monkeypatch.setattr("humming.device.DeviceInfo._get_value", lambda self: StandIn)
    for dynamic in (False, True):
        spec = gpu_spec(in_features=300, out_features=43, dynamic=dynamic)
        made = make_linear(spec, bias=True)
        prepared: Any = INT4.prepare(made.stored, spec)
        config = json.loads(prepared.layer_config)
        assert config["input_quant_mode"] == ("dynamic_token" if dynamic else "static_tensor")
        assert (config["shape_n"], config["shape_k"]) == (256, 384)
        assert (config["pad_shape_n"], config["pad_shape_k"]) == (208, 64)
        assert config["weight_scale_type"] == "channel" and config["c_dtype"] == "bfloat16"
        # Flat layout: 64 outputs by 32 codes, along N first.
        words = prepared.weight.reshape(384 // 32, 256 // 64, 64, 4).permute(1, 2, 0, 3)
        codes = read_bits(words.reshape(256, 384 // 8), 4)
        codes = torch.where(codes < 8, codes, codes - 16)[:48, :320]
        codes = in_order(codes, INT4)
        assert torch.equal(codes[:43, :300], made.codes.to(torch.int64))
        assert not codes[43:].any() and not codes[:, 300:].any()
        assert prepared.weight_scale.shape == (1, 256) and prepared.constant_with_bias.shape == (
            256,
        )

"""Every form that the contract names, loaded by vLLM's own layers from tensors made here."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mergequant.layers.served_linear import ServedLinear
from mergequant_vllm.format import FormatError, LinearFormat
from mergequant_vllm.kernels.codes import CodeWriter
from mergequant_vllm.packing import pack
from tests.forms import linear_form
from tests.mergequant_vllm.kernels.made import random_codes

pytest.importorskip("vllm")

from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from mergequant_vllm.linear import MergeQuantLinearMethod
from mergequant_vllm.parameters import SharedInputParameter

NAME = "model.layers.0.mlp.gate_up_proj"

pytestmark = pytest.mark.usefixtures("_ranks")


class Given(QuantizationConfig):
    """Hands every layer one method: a checkpoint's configuration is not under test here."""

    def __init__(self, *merged: LinearFormat, kernel: str | None = None) -> None:
        super().__init__()
        self.merged, self.kernel = merged, kernel

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> MergeQuantLinearMethod:
        return MergeQuantLinearMethod(prefix, self.merged, self.kernel)

    def get_name(self) -> Any:
        return "mergequant"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Given":
        raise NotImplementedError


def make_tensors(form: LinearFormat, seed: int) -> dict[str, Tensor]:
    """What a checkpoint would hold of a linear of this form."""
    rows, k, bits = form.shape[0], form.in_features, form.weight.bits
    generator = torch.Generator().manual_seed(seed)
    codes = random_codes(bits, rows, k, seed=seed)
    step = torch.rand(rows, form.groups, generator=generator) + 0.01
    tensors = {"weight_packed": pack(codes, bits), "weight_scale": step.to(torch.bfloat16)}
    if form.weight.zero_points:
        tensors["weight_zero_point"] = random_codes(bits, rows, form.groups, seed=seed + 1)
    if form.columns is not None:
        index = torch.randint(0, form.shape[1], (k,), generator=torch.Generator().manual_seed(0))
        tensors["input_index"] = index.to(torch.int32)
    if form.static is not None and form.static.offsets:
        tensors["input_offset"] = torch.rand(k, generator=torch.Generator().manual_seed(1)) - 0.5
    if form.output_offset is not None:
        tensors["output_offset"] = torch.rand(rows, generator=generator) - 0.5
    if form.static is None:
        tensors["input_clip"] = torch.tensor([0.8125])
    return tensors


def reference(form: LinearFormat, tensors: dict[str, Tensor]) -> ServedLinear:
    from mergequant_vllm.packing import unpack

    return ServedLinear(
        form,
        unpack(tensors["weight_packed"], form.weight.bits, form.in_features),
        tensors["weight_scale"],
        zero_points=tensors.get("weight_zero_point"),
        output_offset=tensors.get("output_offset"),
        clip=tensors.get("input_clip"),
        index=tensors.get("input_index"),
        offset=tensors.get("input_offset"),
    )


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """vLLM builds and loads a model under the model's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load(layer: Any, *parts: dict[str, Tensor]) -> None:
    parameters = dict(layer.named_parameters())
    assert parameters.keys() == parts[0].keys()
    for number, tensors in enumerate(parts):
        for name, parameter in parameters.items():
            shard = () if len(parts) == 1 else (number,)
            parameter.weight_loader(parameter, tensors[name], *shard)
    with loading():
        layer.quant_method.process_weights_after_loading(layer)


def merged_layer(first: LinearFormat, second: LinearFormat, kernel: str | None = None) -> Any:
    rows = [first.shape[0], second.shape[0]]
    with loading():
        return MergedColumnParallelLinear(
            first.shape[1], rows, bias=False, params_dtype=torch.float32,
            quant_config=Given(first, second, kernel=kernel), prefix=NAME,
        )  # fmt: skip


WEIGHTS: list[dict[str, Any]] = [
    {"weight_bits": 3, "group_size": 32, "zero_points": True},
    {"weight_bits": 3, "zero_points": True},
    {"weight_bits": 4, "group_size": 64},
    {"weight_bits": 6, "zero_points": True},
    {"weight_bits": 8},
    {},
]
SEGMENTS: list[dict[str, Any]] = [
    {"segments": (32, 64, 32), "zero_points": True},
    {"segments": (64, 64), "output_offset": "float32", "weight_bits": 8},
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(
    "inputs",
    [
        {"columns": 128, "offsets": True},
        {"columns": 64, "activation_bits": 8},
        {"offsets": True, "activation_bits": 6},
        {"offsets": True},
        {"columns": 131},
        {},
    ],
    ids=str,
)
def test_static_linears_equal_the_reference(
    weights: dict[str, Any], inputs: dict[str, Any]
) -> None:
    forms = [linear_form((rows, 64), "static", **weights, **inputs) for rows in (43, 20)]
    tensors = [make_tensors(form, seed) for seed, form in enumerate(forms)]
    layer = merged_layer(*forms)
    load(layer, *tensors)
    x = 3 * torch.randn(9, 64, generator=torch.Generator().manual_seed(5))
    expected = torch.cat([reference(f, t)(x) for f, t in zip(forms, tensors, strict=True)], -1)
    assert torch.equal(layer(x)[0], expected)
    assert not dict(layer.named_parameters()).keys() & {"weight_packed", "weight_scale"}


@pytest.mark.parametrize("kernel", ["cpu-int4", "cpu-fp32", "reference"])
@pytest.mark.parametrize("weights", SEGMENTS, ids=str)
def test_segments_and_constants_equal_the_reference(weights: dict[str, Any], kernel: str) -> None:
    forms = [
        linear_form((rows, 64), "static", columns=128, offsets=True, **weights) for rows in (43, 20)
    ]
    tensors = [make_tensors(form, seed) for seed, form in enumerate(forms)]
    layer = merged_layer(*forms, kernel=kernel)
    load(layer, *tensors)
    x = 3 * torch.randn(9, 64, generator=torch.Generator().manual_seed(5))
    expected = torch.cat([reference(f, t)(x) for f, t in zip(forms, tensors, strict=True)], -1)
    assert torch.equal(layer(x)[0], expected)


def row_layer(form: LinearFormat, kernel: str | None = None) -> Any:
    with loading():
        return RowParallelLinear(
            form.shape[1], form.shape[0], bias=False, params_dtype=torch.float32,
            quant_config=Given(form, kernel=kernel), prefix="model.layers.0.mlp.down_proj",
        )  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_linears_whose_steps_another_carries_equal_the_reference(
    weights: dict[str, Any], bits: int
) -> None:
    form = linear_form((43, 192), "static", norm=None, activation_bits=bits, **weights)
    tensors = make_tensors(form, 3)
    layer = row_layer(form)
    load(layer, tensors)
    x = 3 * torch.randn(9, 192, generator=torch.Generator().manual_seed(5))
    assert torch.equal(layer(x)[0], reference(form, tensors)(x))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(
    "inputs",
    [
        {"hadamard": 32},
        {"activation_bits": 8},
        {"activation_bits": 6, "hadamard": 32},
        {"input_zero_points": True, "hadamard": 64},
    ],
    ids=str,
)
def test_dynamic_linears_equal_the_reference(
    weights: dict[str, Any], inputs: dict[str, Any]
) -> None:
    form = linear_form((43, 192), "dynamic", **weights, **inputs)
    tensors = make_tensors(form, 3)
    layer = row_layer(form)
    load(layer, tensors)
    x = torch.randn(9, 192, generator=torch.Generator().manual_seed(5))
    assert torch.equal(layer(x)[0], reference(form, tensors)(x))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("hadamard", [None, 32])
def test_what_runs_on_gpus_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, hadamard: int | None
) -> None:
    """The quantizers' GPU forms and the Triton product behind them, interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    form: dict[str, Any] = {"weight_bits": 3, "group_size": 32, "zero_points": True}
    static = linear_form((43, 64), "static", columns=80, offsets=True, **form)
    dynamic = linear_form((64, 192), "dynamic", hadamard=hadamard, **form)
    tensors = [make_tensors(static, 0), make_tensors(static, 1), make_tensors(dynamic, 2)]
    up, down = merged_layer(static, static, "triton"), row_layer(dynamic, "triton")
    load(up, *tensors[:2])
    load(down, tensors[2])
    assert {x.quantizer.form.writer for x in (up, down)} == {CodeWriter.GPU}
    x = 3 * torch.randn(9, 64, generator=torch.Generator().manual_seed(5))
    z = torch.randn(9, 192, generator=torch.Generator().manual_seed(6))

    def run(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return up(x)[0], down(z)[0]

    outputs = torch.compile(run, fullgraph=True)(x, z) if compiled else run(x, z)
    expected = torch.cat([reference(static, part)(x) for part in tensors[:2]], -1)
    assert torch.equal(outputs[0], expected)
    assert torch.equal(outputs[1], reference(dynamic, tensors[2])(z))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_each_rank_of_two_takes_its_own_columns(
    monkeypatch: pytest.MonkeyPatch, weights: dict[str, Any]
) -> None:
    """The second of two ranks of a row-parallel linear: its words, its groups, its rotation."""
    whole = linear_form((43, 256), "dynamic", hadamard=64, **weights)
    half = replace(whole, shape=(43, 128))
    tensors = make_tensors(whole, 3)
    for module in ("parameter", "layers.linear"):
        where = f"vllm.model_executor.{module}"
        monkeypatch.setattr(f"{where}.get_tensor_model_parallel_rank", lambda: 1)
        monkeypatch.setattr(f"{where}.get_tensor_model_parallel_world_size", lambda: 2)
    layer = row_layer(whole)
    layer.reduce_results = False
    load(layer, tensors)
    from mergequant_vllm.packing import unpack

    codes = unpack(tensors["weight_packed"], whole.weight.bits, 256)[:, 128:]
    mine = {**tensors, "weight_packed": pack(codes, whole.weight.bits)}
    if whole.weight.group_size is not None:
        second = slice(whole.groups // 2, None)
        for name in tensors.keys() & {"weight_scale", "weight_zero_point"}:
            mine[name] = tensors[name][:, second]
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(5))
    assert torch.equal(layer(x)[0], reference(half, mine)(x))


def test_shards_that_cut_groups_or_rotations_are_refused() -> None:
    def refuse(**fields: Any) -> None:
        form = linear_form((64, 192), "dynamic", **fields)
        MergeQuantLinearMethod("down", [form], None).create_weights(
            torch.nn.Module(), 96, [64], 192, 64, torch.float32, weight_loader=lambda *_: None
        )

    refuse(group_size=32)
    with pytest.raises(
        ValueError, match=r"96 a rank, .* groups \(64 codes each\): use .*size 1, or"
    ):
        refuse(group_size=64)
    with pytest.raises(ValueError, match=r"not a whole number of Hadamard blocks \(64 codes"):
        refuse(hadamard=64)
    with pytest.raises(ValueError, match=r"not a whole number of runs of mixed heads \(192 codes"):
        refuse(heads=(6, 32))
    with pytest.raises(
        ValueError, match=r"would cut its 2 segments .*: use --tensor-parallel-size 1"
    ):
        refuse(segments=(64, 128))


def test_merged_linears_must_read_the_same_channels() -> None:
    forms = [linear_form((8, 64), "static", columns=64, offsets=True) for _ in range(2)]
    for name in ("input_index", "input_offset"):
        tensors = [make_tensors(form, 0) for form in forms]
        tensors[1][name] = tensors[1][name].flip(0)
        with pytest.raises(FormatError, match="different input_index or input_offset"):
            load(merged_layer(*forms), *tensors)


def test_linears_of_different_form_are_not_merged() -> None:
    one = linear_form((8, 64), "static")
    others: list[dict[str, Any]] = [{"weight_bits": 3}, {"columns": 64}, {"norm": "m"}]
    for other in (*others, {"zero_points": True}, {"segments": (32, 32)}):
        with pytest.raises(FormatError, match="are stored in different ways"):
            MergeQuantLinearMethod("gate_up", [one, linear_form((8, 64), "static", **other)], None)


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("input_index", 64, r"input_index .* names channels outside \[0, 63\]"),
        ("weight_zero_point", 9, r"weight_zero_point .* is outside \[-4, 3\]"),
        ("input_offset", float("inf"), "input_offset .* is not finite"),
        ("weight_scale", float("nan"), "weight_scale .* is not finite"),
    ],
)
def test_values_that_no_quantizer_writes_are_refused(name: str, bad: float, message: str) -> None:
    fields: dict[str, Any] = {"columns": 64, "offsets": True, "zero_points": True, "weight_bits": 3}
    form = linear_form((8, 64), "static", **fields)
    tensors = make_tensors(form, 0)
    tensors[name][-1] = bad
    with pytest.raises(FormatError, match=message):
        load(merged_layer(form, form), tensors, tensors)


@pytest.mark.parametrize("clip", [0.0, -1.0, 5.0, float("inf"), float("nan")])
def test_clip_ratios_that_no_quantizer_writes_are_refused(clip: float) -> None:
    form = linear_form((8, 64), "dynamic")
    tensors = make_tensors(form, 0) | {"input_clip": torch.tensor([clip])}
    with pytest.raises(FormatError, match=r"down_proj.input_clip .* is outside \(0, 1\]"):
        load(row_layer(form), tensors)


def test_weights_are_not_loaded_twice() -> None:
    form = linear_form((8, 64), "dynamic")
    layer, tensors = row_layer(form), make_tensors(form, 0)
    load(layer, tensors)
    with pytest.raises(ValueError, match=r"down_proj: .* cannot be loaded again .*: restart it"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_head_that_a_server_leaves_out_is_not_prepared() -> None:
    """vLLM puts the head on the meta device where the model embeds or classifies."""
    form = linear_form((8, 64), "dynamic")
    layer = row_layer(form)
    empty = torch.empty_like(layer.weight_packed, device="meta")
    layer.weight_packed = torch.nn.Parameter(empty, requires_grad=False)
    layer.quant_method.process_weights_after_loading(layer)
    assert not hasattr(layer, "product")


def test_vllm_may_count_what_it_is_going_to_load() -> None:
    """On the meta device nothing can be compared: a reload must reach its refusal."""
    empty = torch.empty(64, dtype=torch.int32, device="meta")
    parameter = SharedInputParameter(data=empty)
    for _ in range(2):
        parameter.weight_loader(parameter, torch.arange(64, dtype=torch.int32), 1)

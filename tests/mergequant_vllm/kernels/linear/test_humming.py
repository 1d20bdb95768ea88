"""Humming's kernels behind an emulation of the library: layouts, scales, calls and refusals.

What the library itself computes is compared with `humming.rounding` on a GPU, not here;
test_humming_rounding.py compares those roundings with exact arithmetic.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mergequant_vllm.kernels.codes import CodeLayout, lay_out
from mergequant_vllm.kernels.linear.humming import kernel as humming
from mergequant_vllm.kernels.linear.humming.kernel import (
    HummingInt4Linear,
    HummingPrepared,
    humming_linear,
)
from mergequant_vllm.kernels.linear.humming.library import library_tensors
from mergequant_vllm.kernels.linear.humming.rounding import emulate, power_of_two
from mergequant_vllm.kernels.linear.reference import ReferenceLinear
from tests.mergequant_vllm.kernels.linear.emulated_humming import (
    RANGES,
    VERSIONS,
    Emulated,
    install,
    read_bits,
)
from tests.mergequant_vllm.kernels.linear.humming_cases import (
    FORMS,
    IDS,
    INT4,
    INT8,
    SIXTEEN_BITS,
    Kernel,
    gpu_spec,
    in_order,
)
from tests.mergequant_vllm.kernels.made import (
    make_inputs,
    make_linear,
    make_token_step,
    random_codes,
    run,
)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Emulated:
    """The newest version, emulated."""
    return install(monkeypatch, VERSIONS[-1], tmp_path)


@pytest.fixture
def cold() -> Iterator[None]:
    """No kernel is warm."""
    before = humming._warm.copy()
    humming._warm.clear()
    yield
    humming._warm.clear()
    humming._warm.update(before)


# Tokens, N, K, whether there is a bias, whether tokens have steps: on and off the tiles.
SIZES = [(1, 64, 256, False, False), (127, 43, 352, True, True)]
SIZES += [(128, 40, 320, True, False), (129, 129, 127, True, True)]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("kernel", "form"), FORMS, ids=IDS)
def test_what_the_library_is_handed_decodes_to_the_emulation(
    library: Emulated, kernel: Kernel, form: dict[str, object], dtype: torch.dtype
) -> None:
    for m, n, k, bias, dynamic in SIZES:
        spec = gpu_spec(in_features=k, out_features=n, dtype=dtype, dynamic=dynamic, **form)
        assert kernel.refusal(spec) is None
        x, step, _ = make_inputs(spec, m, seed=n)
        for offset in (False, True):
            made = make_linear(spec, bias=bias, offset=offset, seed=m)
            prepared = kernel.prepare(made.stored, spec)
            codes = lay_out(x, kernel.layout, prepared.columns)
            for add_bias in {bias, False}:
                y = prepared(codes, step, None, add_bias)
                assert y.dtype == dtype and torch.isfinite(y).all()
                assert torch.equal(y, emulate(made.stored, spec, x, step, add_bias))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_every_version_of_the_library_gets_its_own_arguments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, dynamic: bool
) -> None:
    install(monkeypatch, version, tmp_path)
    for kernel in (INT4, INT8):
        spec = gpu_spec(weight_bits=3, dtype=torch.float16, dynamic=dynamic)
        if kernel is INT8:
            spec = dataclasses.replace(spec, zero_points=True, group_size=128)
        assert kernel.refusal(spec) is None
        made = make_linear(spec, bias=True)
        x, step = random_codes(4, 2, 64, 352), make_token_step(128).reshape(2, 64, 1)
        y = run(kernel, made, x, step if dynamic else None, True)
        expected = emulate(made.stored, spec, x, step if dynamic else None, True)
        assert torch.equal(y, expected)


@pytest.mark.parametrize(("kernel", "form"), FORMS, ids=IDS)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bfloat16", "float16"])
def test_it_equals_the_reference_where_nothing_rounds(
    library: Emulated, kernel: Kernel, form: dict[str, object], dtype: torch.dtype
) -> None:
    # Every 70th channel is used, by codes of -1 to 1: sums of a few bits. Steps and biases are
    # powers of two, the bias the largest: whatever is added has at most 8 bits.
    for dynamic in (False, True):
        spec = gpu_spec(in_features=352, out_features=43, dtype=dtype, dynamic=dynamic, **form)
        codes = torch.zeros(43, 352, dtype=torch.int8)
        codes[:, ::70] = random_codes(3, 43, 6).clamp(-1, 1)
        zeros = torch.zeros(43, spec.groups, dtype=torch.int8) if spec.zero_points else None
        made = make_linear(spec, codes=codes, zero_points=zeros, bias=True)
        exponents = torch.arange(43).unsqueeze(1).expand(43, spec.groups) % 3
        stored = dataclasses.replace(
            made.stored, weight_step=2.0 ** (exponents - 9), bias=torch.full((43,), 0.5).to(dtype)
        )
        x = random_codes(3, 128, 352).clamp(-1, 1)
        step = 2.0 ** (torch.arange(128).reshape(-1, 1) % 3 - 2) if dynamic else None
        expected = ReferenceLinear().prepare(stored, spec)(x, step, None, True)
        assert expected.unique().numel() > 9
        y = run(kernel, dataclasses.replace(made, stored=stored), x, step, True)
        assert torch.equal(y, expected)


@pytest.mark.parametrize(("kernel", "form"), FORMS, ids=IDS)
def test_the_library_gets_documented_layouts(
    library: Emulated, kernel: Kernel, form: dict[str, object]
) -> None:
    spec = gpu_spec(in_features=300, out_features=43, dtype=torch.float16, **form)
    made = make_linear(spec, bias=True)
    prepared = kernel.prepare(made.stored, spec)
    handed, half = library.handed, 2 ** (spec.weight_bits - 1)
    weight = in_order(read_bits(handed["weight"], spec.weight_bits) - half, kernel)
    assert weight.shape[1] == prepared.columns and prepared.columns % 32 == 0
    assert torch.equal(weight[:43, :300], made.codes.to(torch.int64))
    assert not weight[43:].any() and not weight[:, 300:].any()
    scale = made.stored.weight_step * 2.0 ** power_of_two(made.stored, spec)
    assert torch.equal(handed["weight_scale"][:43].float(), scale)
    assert torch.equal(handed["bias"][:43], made.stored.bias)  # type: ignore[arg-type]
    if made.stored.zero_points is not None:
        zeros = read_bits(handed["zero_point"].T, spec.weight_bits) - half
        assert torch.equal(zeros[:, :43].T, made.stored.zero_points.to(torch.int64))


def test_stored_words_are_handed_on_where_nothing_is_padded() -> None:
    made = make_linear(gpu_spec(in_features=352, out_features=128))
    assert (
        library_tensors(made.stored, made.spec, CodeLayout.INT8, 0, None)["weight"]
        is made.stored.weight_packed
    )


def test_a_configuration_that_was_not_asked_for_is_an_error(library: Emulated) -> None:
    made = make_linear(gpu_spec())
    for lie in ({"a_dtype": "int8"}, {"use_int_weight_scale": True}):
        library.lies = dict(lie)
        with pytest.raises(RuntimeError, match=r"humming configured .* was asked for"):
            INT4.prepare(made.stored, made.spec)


@pytest.mark.usefixtures("cold")
def test_scales_are_float32_whatever_the_default_dtype_is(library: Emulated) -> None:
    specs = [
        gpu_spec(dtype=torch.float16, dynamic=dynamic, in_features=4096)
        for dynamic in (False, True)
    ]
    linears = [make_linear(spec) for spec in specs]
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads a model
    try:
        for made in linears:
            prepared = INT4.prepare(made.stored, made.spec)
            prepared.warm_up()  # type: ignore[operator]
    finally:
        torch.set_default_dtype(torch.float32)
    scales = [launch["input_scale"] for launch in library.launches]
    assert {scale.dtype for scale in scales} == {torch.float32}


def test_no_tokens_launch_nothing(library: Emulated) -> None:
    made = make_linear(gpu_spec())
    y = run(INT8, made, torch.zeros(0, 352, dtype=torch.int8), None, False)
    assert y.shape == (0, 128) and y.dtype == torch.bfloat16 and not library.launches


def test_stream_k_brings_locks(library: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(humming, "_locks", lambda device: torch.zeros(1024, dtype=torch.int32))
    made = make_linear(gpu_spec())
    x = random_codes(4, 3, 352)
    expected = run(INT4, made, x, None, False)
    assert torch.equal(run(HummingInt4Linear(stream_k=True), made, x, None, False), expected)
    exact, shared = library.launches
    assert exact["locks"] is None and shared["locks"].shape == (1024,)


@pytest.mark.parametrize("kernel", [INT4, INT8], ids=lambda kernel: kernel.name)
@pytest.mark.usefixtures("cold")
def test_warm_up_launches_each_kernel_once_a_shape(
    library: Emulated, kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="vllm.mergequant")
    prepared = []
    for seed, dynamic in ((0, False), (1, False), (2, True)):
        made = make_linear(gpu_spec(dynamic=dynamic), bias=True, seed=seed)
        prepared.append(kernel.prepare(made.stored, made.spec))
    assert all(isinstance(each, HummingPrepared) for each in prepared)
    for each in prepared:
        each.warm_up()  # type: ignore[operator]
    first = {number: before + 1 for before, _, number, _ in reversed(RANGES)}
    launched = [launch["inputs"].shape[0] for launch in library.launches]
    assert launched == sorted(first.values()) * 2  # the second layer has the first one's shape
    assert (library.folder / "mergequant").exists()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("humming: 3 kernels for 352 inputs and 128 outputs ready after")


@pytest.mark.parametrize(("kernel", "dynamic"), [(INT4, False), (INT8, True)])
def test_it_is_opaque_to_the_compiler(library: Emulated, kernel: Kernel, dynamic: bool) -> None:
    made = make_linear(gpu_spec(dtype=torch.float16, dynamic=dynamic), bias=True)
    prepared = kernel.prepare(made.stored, made.spec)
    compiled = torch.compile(prepared, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (3, 129):
        x, step, _ = make_inputs(made.spec, m)
        codes = lay_out(x, kernel.layout, prepared.columns)
        assert torch.equal(compiled(codes, step, None, True), prepared(codes, step, None, True))


def test_the_operation_is_registered_as_it_behaves(library: Emulated) -> None:
    made = make_linear(gpu_spec(out_features=43), bias=True)
    prepared: Any = INT8.prepare(made.stored, made.spec)
    codes = random_codes(4, 5, 2, 352)
    arguments = (
        codes,
        prepared.weight,
        prepared.weight_scale,
        prepared.zero_point,
        prepared.constant_with_bias,
        prepared.input_scale,
        None,
        prepared.layer_config,
        prepared.compute_config,
        43,
    )
    torch.library.opcheck(humming_linear, arguments)


REFUSALS: list[tuple[Kernel, dict[str, object], str]] = [
    (INT4, {"device": "cpu"}, "it runs on NVIDIA GPUs and the layer is on cpu"),
    (INT8, {"dtype": torch.float32}, "the model is in float32; use --dtype bfloat16"),
    (INT4, {"weight_bits": 8}, "it takes weights of 3 or 4 bits and the layer has 8 bits"),
    (INT8, {"weight_bits": 5}, "it takes weights of 3 or 4 or 8 bits and the layer has 5 bits"),
    (INT4, {"activation_bits": 8}, "it takes activations of 4 bits and the layer has 8"),
    (INT4, {"zero_points": True}, "it takes no zero points with weights of 4 bits"),
    (INT8, {"zero_points": True, "weight_bits": 8}, "no zero points with weights of 8 bits"),
    (INT4, {"group_size": 64}, "output channel, the layer has groups of 64; use humming-int8"),
    (INT8, {"group_size": 16}, "groups of 32 or a higher power of two and the layer has 16"),
    (INT8, {"group_size": 96}, "groups of 32 or a higher power of two and the layer has 96"),
    (INT4, {"capability": 70}, "it needs compute capability 7.5 and the GPU has 7.0"),
    (INT8, {"capability": 75}, "bfloat16 needs compute capability 8.0 (this is 7.5)"),
    (INT4, {"capability": 90}, "at compute capability 8.9, this is 9.0; use humming-int8"),
    (INT8, {"capability": 103}, "INT8 tensor cores are slow in compute capability 10.3"),
]


@pytest.mark.parametrize(("kernel", "changes", "reason"), REFUSALS)
def test_refusals_say_why(
    library: Emulated, kernel: Kernel, changes: dict[str, object], reason: str
) -> None:
    assert reason in str(kernel.refusal(gpu_spec(**changes)))


@pytest.mark.parametrize(
    ("kernel", "changes"),
    [
        (INT4, {"capability": None}),
        (INT4, {"capability": 75, "dtype": torch.float16}),
        (INT4, {"capability": 89, "group_size": 512}),  # one group: a step per output channel
        (INT8, {"capability": 100}),
        (INT8, {"capability": 110}),
        (INT8, {"capability": 121, "in_features": 64, "group_size": 96}),
    ],
)
def test_what_is_not_refused(library: Emulated, kernel: Kernel, changes: dict[str, object]) -> None:
    assert kernel.refusal(gpu_spec(**changes)) is None


def test_old_versions_are_refused_where_they_lack_something(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, "0.1.12", tmp_path)
    old, thor = gpu_spec(capability=75, dtype=torch.float16), gpu_spec(capability=110)
    assert "needs humming-kernels 0.1.17, not 0.1.12; upgrade vLLM" in str(INT4.refusal(old))
    assert INT8.refusal(old) is None
    assert "needs humming-kernels 0.1.14, not 0.1.12; upgrade vLLM" in str(INT8.refusal(thor))
    zeros = gpu_spec(zero_points=True)
    assert "needs humming-kernels 0.1.17, not 0.1.12; upgrade vLLM" in str(INT8.refusal(zeros))
    assert INT8.refusal(gpu_spec(zero_points=True, group_size=128)) is None


def test_a_missing_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "humming", None)
    reason = str(INT4.refusal(gpu_spec()))
    assert reason.startswith("humming-kernels cannot be imported (")
    assert reason.endswith("); install vLLM for CUDA")

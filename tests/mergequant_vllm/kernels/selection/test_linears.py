"""Kernels are chosen by name or by a table, and never changed in silence."""

import logging
from typing import Any

import pytest
import torch

from mergequant_vllm.kernels.linear import cutlass, marlin
from mergequant_vllm.kernels.linear.cpu.int4 import CpuInt4Linear
from mergequant_vllm.kernels.linear.humming import kernel as humming
from mergequant_vllm.kernels.selection import first_choices as defaults
from mergequant_vllm.kernels.selection import linears as select
from tests.mergequant_vllm.kernels.made import make_spec

SPEC = make_spec(in_features=64, out_features=8)

INT4: dict[str, Any] = {}
BY_INT8: dict[str, Any] = {"activation_bits": 8}
W3: dict[str, Any] = {"weight_bits": 3}
W3_GROUPS: dict[str, Any] = {"weight_bits": 3, "group_size": 128, "zero_points": True}
SEGMENTS: dict[str, Any] = {"segments": (128, 3968)}
SHIFTED: dict[str, Any] = {"dynamic": True, "token_zero_points": True}
W8: dict[str, Any] = {"weight_bits": 8, "activation_bits": 8}


@pytest.fixture(autouse=True)
def _forget_what_was_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    select._log_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)


@pytest.fixture
def _libraries_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU machine with vLLM for CUDA."""
    monkeypatch.setattr(marlin, "_missing_operations", lambda: None)
    monkeypatch.setattr(cutlass, "_missing_operation", lambda: None)
    monkeypatch.setattr(humming._HummingLinear, "_refuse_library", lambda *_: None)


def gpu(capability: int | None, **changes: object) -> Any:
    fields: dict[str, object] = {"in_features": 4096, "out_features": 4096, "device": "cuda"}
    dtype = torch.float16 if capability == 75 else torch.bfloat16
    return make_spec(**{**fields, "dtype": dtype, "capability": capability, **changes})


@pytest.mark.usefixtures("_libraries_are_there")
@pytest.mark.parametrize(
    ("capability", "form", "kernel"),
    [
        (75, INT4, "humming-int4"),
        (75, BY_INT8, "humming-int8"),
        (75, W3, "humming-int8"),
        (75, W8, "humming-int8"),
        *((c, INT4, "humming-int4") for c in (80, 86, 89)),
        *((c, BY_INT8, "marlin-int8") for c in (80, 86, 89)),
        *((c, w, "humming-int8") for c in (80, 86, 89) for w in (W3, W3_GROUPS, W8)),
        *((c, form, "marlin-int8") for c in (90, 100, 120) for form in (INT4, BY_INT8)),
        *((c, w, "humming-int8") for c in (90, 100, 120) for w in (W3, W3_GROUPS, W8)),
        *((c, form, "triton") for c in (80, 90, 100, 120) for form in (SEGMENTS, SHIFTED)),
        *((75, form, "reference") for form in (SEGMENTS, SHIFTED)),
        (103, W3, "triton"),
        (None, INT4, "triton"),
        (130, INT4, "triton"),
    ],
)
def test_the_documented_kernel_is_chosen(
    capability: int | None, form: dict[str, Any], kernel: str
) -> None:
    assert select.select_linear(gpu(capability, **form), None).name == kernel


def test_every_gpu_in_range_has_a_row_for_every_kind() -> None:
    for capability in (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121):
        for kind in defaults.Kind:
            rows = [r for r in defaults.GPUS if r.oldest <= capability <= r.newest]
            assert [r.kind for r in rows].count(kind) == 1
    assert all(row.kernels[-1] == "reference" and row.evidence for row in defaults.GPUS)
    named = {name for row in defaults.GPUS for name in row.kernels}
    assert named <= select.LINEAR_KERNELS.keys()
    assert "cutlass-int8" not in named  # twice the memory: only by name


@pytest.mark.parametrize(
    ("kernel", "spec", "reason"),
    [
        ("humming-int4", gpu(90), r"INT4 .* end at .* 8\.9, this is 9\.0; use humming-int8"),
        ("humming-int4", gpu(86, activation_bits=8), "takes activations of 4 bits"),
        ("humming-int4", gpu(86, zero_points=True), "no zero points with weights of 4 bits"),
        ("humming-int8", gpu(103), r"slow in compute capability 10\.3"),
        ("humming-int8", gpu(90, group_size=96), "has 96"),
        ("marlin-int8", gpu(75), r"needs compute capability 8\.0 and the GPU has 7\.5"),
        ("marlin-int8", gpu(90, weight_bits=3), "reads 4-bit weights and the layer has 3"),
        ("marlin-int8", gpu(90, group_size=128), "has groups of 128"),
        (
            "marlin-int8",
            gpu(90, **SEGMENTS),
            "a step per output .*, the layer has 2 segments",
        ),
        ("marlin-int8", gpu(90, **SHIFTED), "takes no zero points of activations"),
        (
            "cutlass-int8",
            gpu(90, **SEGMENTS),
            "a step per output .*, the layer has 2 segments",
        ),
        ("cutlass-int8", gpu(90, **SHIFTED), "takes no zero points of activations"),
        ("humming-int4", gpu(86, **SEGMENTS), "takes no segments of input channels"),
        ("humming-int8", gpu(90, **SHIFTED), "takes no zero points of activations"),
        ("marlin-int8", gpu(90, dtype=torch.float32), "use --dtype bfloat16"),
        ("cutlass-int8", gpu(100), "choose marlin-int8"),
        ("triton", gpu(75), r"needs compute capability 8\.0 and the GPU has 7\.5"),
        ("triton", SPEC, r"runs on GPUs .* and the layer is on cpu"),
        ("cpu-fp32", gpu(90), "runs on the CPU and the layer is on cuda"),
    ],
)
def test_a_requested_kernel_that_refuses_is_an_error_with_the_reason(
    kernel: str, spec: Any, reason: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"Kernel '{kernel}' cannot run a linear of .*{reason}"
    ) as error:
        select.select_linear(spec, kernel)
    assert str(error.value).endswith("; unset MERGEQUANT_KERNEL to use the default.")


def test_a_head_that_a_requested_kernel_refuses_runs_on_a_default_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    head = gpu(90, weight_bits=8, activation_bits=8)
    with caplog.at_level(logging.WARNING, logger="vllm.mergequant"):
        chosen = select.select_linear(head, "marlin-int8", or_default=True)
    assert chosen.name == select.select_linear(head, None).name
    assert "'marlin-int8', which MERGEQUANT_KERNEL asks for, was refused: it reads 4" in caplog.text
    assert select.select_linear(head, "reference", or_default=True).name == "reference"


def test_on_a_cpu_the_cpus_kernel_is_chosen() -> None:
    native = CpuInt4Linear().refusal(SPEC) is None
    assert select.select_linear(SPEC, None).name == ("cpu-int4" if native else "cpu-fp32")


def test_a_requested_kernel_is_used_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vllm.mergequant"):
        for _ in range(2):
            assert select.select_linear(SPEC, "reference").name == "reference"
    lines = [r.getMessage() for r in caplog.records if "kernel 'reference'" in r.getMessage()]
    what = "4-bit weights per channel, 4-bit activations"
    assert lines == [f"Linears with {what} run on kernel 'reference', as MERGEQUANT_KERNEL asks"]


def test_a_fallback_is_logged_with_every_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(marlin, "_missing_operations", lambda: "marlin_gemm is not there")
    monkeypatch.setattr(humming._HummingLinear, "_refuse_library", lambda *_: "no humming")
    with caplog.at_level(logging.INFO, logger="vllm.mergequant"):
        assert select.select_linear(gpu(90), None).name == "triton"
    assert caplog.records[-1].levelno == logging.WARNING
    assert caplog.records[-1].getMessage() == (
        "Linears with 4-bit weights per channel, 4-bit activations run on kernel 'triton' "
        "(cuda 9.0); 'marlin-int8' was refused: marlin_gemm is not there; "
        "'humming-int8' was refused: no humming"
    )


def test_the_environment_names_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(select.KERNEL_VARIABLE, "reference")
    assert select.requested_kernel() == "reference"
    monkeypatch.setenv(select.KERNEL_VARIABLE, "")
    assert select.requested_kernel() is None
    monkeypatch.setenv(select.KERNEL_VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"'fast' is not a kernel: choose one of cpu-int4"):
        select.requested_kernel()

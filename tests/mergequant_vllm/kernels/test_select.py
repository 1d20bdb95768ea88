"""Kernels are chosen by name or by device, and never changed in silence."""

import dataclasses
import logging

import pytest
import torch

from mergequant_vllm.kernels import select
from mergequant_vllm.kernels.int4_linear.spec import LinearSpec

SPEC = LinearSpec(
    in_features=64,
    out_features=8,
    weight_bits=4,
    activation_bits=4,
    dynamic=False,
    device="cpu",
    dtype=torch.float32,
)


@pytest.fixture(autouse=True)
def _forget_what_was_logged() -> None:
    select._log_once.cache_clear()


def test_the_default_follows_the_device() -> None:
    assert select.select_linear(SPEC, None).name == "cpu-fp32"


def test_a_requested_kernel_is_used() -> None:
    assert select.select_linear(SPEC, "reference").name == "reference"


def test_a_requested_kernel_that_refuses_is_an_error_with_the_reason() -> None:
    on_gpu = dataclasses.replace(SPEC, device="cuda")
    with pytest.raises(ValueError, match=r"'cpu-fp32' cannot run .*it runs on the CPU"):
        select.select_linear(on_gpu, "cpu-fp32")


def test_a_fallback_is_logged_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vllm").propagate = True
    too_long = dataclasses.replace(SPEC, in_features=300_000)
    with caplog.at_level(logging.INFO):
        assert select.select_linear(too_long, None).name == "reference"
    assert "'cpu-fp32' was refused: K = 300000" in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING


def test_the_environment_names_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(select.KERNEL_VARIABLE, "reference")
    assert select.requested_kernel() == "reference"
    monkeypatch.setenv(select.KERNEL_VARIABLE, "")
    assert select.requested_kernel() is None
    monkeypatch.setenv(select.KERNEL_VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"'fast' is not a kernel: choose one of cpu-fp32"):
        select.requested_kernel()

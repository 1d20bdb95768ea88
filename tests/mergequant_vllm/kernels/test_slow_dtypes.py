"""Which dtypes are said to be slow, where, and that it is said once."""

import logging
from pathlib import Path

import pytest
import torch

from mergequant_vllm import doctor
from mergequant_vllm.kernels import slow_dtypes
from mergequant_vllm.kernels.linear.spec import LinearSpec
from mergequant_vllm.kernels.selection import linears
from mergequant_vllm.kernels.slow_dtypes import slow_dtype


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What stands in for /proc/cpuinfo: a CPU with AVX2 alone."""
    file = tmp_path / "cpuinfo"
    file.write_text("flags : sse2 avx2 f16c\n")
    monkeypatch.setattr(slow_dtypes, "_CPU", file)
    linears._log_once.cache_clear()
    return file


def test_16_bits_are_slow_on_a_cpu_without_instructions_for_them(flags: Path) -> None:
    said = slow_dtype("cpu", torch.bfloat16)
    assert said is not None and "--dtype float32" in said and "bfloat16" in said
    assert "float16" in (slow_dtype("cpu", torch.float16) or "")
    assert slow_dtype("cpu", torch.float32) is None
    assert slow_dtype("cuda", torch.bfloat16) is None


@pytest.mark.parametrize("known", ["avx512_bf16", "amx_bf16", "bf16"])
def test_with_instructions_nothing_is_said(flags: Path, known: str) -> None:
    flags.write_text(f"flags : avx2 {known}\n")
    assert slow_dtype("cpu", torch.bfloat16) is None


def test_where_the_system_does_not_say_neither_do_we(flags: Path) -> None:
    flags.unlink()
    assert slow_dtype("cpu", torch.bfloat16) is None


def test_the_log_says_it_once_and_doctor_too(
    flags: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = LinearSpec(
        in_features=64,
        out_features=64,
        weight_bits=4,
        activation_bits=4,
        dynamic=False,
        device="cpu",
        dtype=torch.bfloat16,
    )
    with caplog.at_level(logging.WARNING, "vllm.mergequant"):
        for _ in range(3):
            linears.select_linear(spec, "reference")
    assert caplog.text.count("serve with --dtype float32") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = logging.getLogger("vllm").level
    assert "bfloat16, the default of most models" in doctor.report()
    assert logging.getLogger("vllm").level == before

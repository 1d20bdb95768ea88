"""The supported range of vLLM, at its ends."""

import logging
import sys

import pytest

import mergequant_vllm
from mergequant_vllm import version


@pytest.mark.parametrize("release", ["0.26.0", "0.27.1", "0.32.0+cpu", "0.33.0", "0.33.5"])
def test_releases_in_the_range_are_accepted(release: str) -> None:
    assert version.unsupported_vllm(release) is None


@pytest.mark.parametrize("release", ["0.25.1", "0.34.0", "1.0.0", "0.9.2", "dev"])
def test_other_releases_are_refused_by_number(release: str) -> None:
    refusal = version.unsupported_vllm(release)
    assert refusal is not None
    assert release in refusal and "0.26 to 0.33" in refusal and "install" in refusal


def test_registration_warns_and_the_checkpoint_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vllm = pytest.importorskip("vllm")
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    mergequant_vllm.register()
    assert "the installed version is 0.34.0" in caplog.text
    from mergequant_vllm.config import MergeQuantConfig

    with pytest.raises(ValueError, match=r"vLLM 0\.26 to 0\.33; the installed version is 0\.34\.0"):
        MergeQuantConfig.from_config({"quant_method": "mergequant"})


def test_other_models_are_served_by_a_vllm_that_the_plugin_cannot_even_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm = pytest.importorskip("vllm")
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    monkeypatch.setitem(sys.modules, "mergequant_vllm.config", None)
    mergequant_vllm.register()
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(ImportError):
        mergequant_vllm.register()


def test_registration_is_idempotent() -> None:
    quantization = pytest.importorskip("vllm.model_executor.layers.quantization")
    mergequant_vllm.register()
    mergequant_vllm.register()
    config_class: type = quantization.get_quantization_config("mergequant")
    assert config_class.__name__ == "MergeQuantConfig"

"""The number that kernels compare, and how users read it."""

import pytest
import torch

from mergequant_vllm.kernels.capability import current_capability, read_capability, spell


@pytest.mark.parametrize(("major", "minor"), [(7, 5), (8, 0), (10, 3), (12, 1)])
def test_the_number_is_read_and_spelled(
    major: int, minor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, minor))
    assert read_capability() == 10 * major + minor
    assert spell(read_capability()) == f"{major}.{minor}"


def test_only_nvidias_gpus_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert current_capability("cuda") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert current_capability("cuda") == 90
    assert current_capability("cpu") is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert current_capability("cuda") is None

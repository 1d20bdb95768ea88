"""Where a model is found: a folder, or the hub's, at a revision."""

from pathlib import Path
from typing import Any

import pytest

from mergequant.errors import InputError
from mergequant.model import reader
from mergequant.model.reader import locate


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Any]]:
    """What a stand-in for the hub was asked for: name and revision."""
    calls: list[tuple[str, Any]] = []

    def snapshot_download(name: str, *, revision: Any, allow_patterns: Any, **_: Any) -> str:
        assert "*.safetensors" in allow_patterns and "LICENSE*" in allow_patterns
        calls.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr(reader, "snapshot_download", snapshot_download)
    return calls


def test_a_hub_id_may_name_a_revision(asked: list[tuple[str, Any]], tmp_path: Path) -> None:
    assert locate("org/name") == locate("org/name@v1.0") == tmp_path
    assert asked == [("org/name", None), ("org/name", "v1.0")]


def test_a_folder_is_taken_whatever_its_name(asked: list[tuple[str, Any]], tmp_path: Path) -> None:
    (folder := tmp_path / "model@home").mkdir()
    assert locate(folder) == folder and not asked
    with pytest.raises(InputError, match="does not exist"):
        locate(tmp_path / "none@home")

"""What goes to the hub, and what is said when it refuses. No network."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from mergequant import InputError, cli
from mergequant.output import push as module


class Hub:
    """Stands in for the hub's client and notes what it was given."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.refuses = False

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
        if self.refuses:
            raise PermissionError("no token")
        self.calls.append((name, private, exist_ok))
        return f"https://hub/{name}"

    def upload_folder(self, *, repo_id: str, allow_patterns: list[str], **_: Any) -> None:
        self.calls.append((repo_id, allow_patterns))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(module, "HfApi", lambda: hub)
    return hub


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "out"))
    (folder / ".partial").mkdir()
    (folder / ".partial" / "lock").write_text("1")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def test_all_files_but_hidden_ones_go(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.app(["push", str(folder), "org/name", "--private"], standalone_mode=False)
    assert capsys.readouterr().out.strip() == "https://hub/org/name"
    made, (name, files) = hub.calls
    assert made == ("org/name", True, True) and name == "org/name"
    assert {"config.json", "README.md", "recipe.yaml", "1_Pooling/config.json"} <= set(files)
    assert not [file for file in files if ".partial" in file]


def test_a_dry_run_only_lists(hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.app(["push", str(folder), "org/name", "--dry-run"], standalone_mode=False)
    assert "model-00001-of-00003.safetensors" in capsys.readouterr().out and not hub.calls


def test_a_refusal_is_one_sentence(hub: Hub, folder: Path, llama: Path) -> None:
    hub.refuses = True
    with pytest.raises(InputError, match=r"did not take org/name \(PermissionError\)"):
        module.push(folder, "org/name")
    with pytest.raises(InputError, match="not a mergequant checkpoint"):
        module.push(llama, "org/name")

"""Others' libraries: installed once, or the reason why not, which the tables give."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cpu import peers
from benchmarks.cpu.machine import cpu_vendor
from benchmarks.cpu.peers import PEERS, REASON, install, refusal

AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\n"


class Pip:
    """Stands for pip: refuses what it is told to, and counts its calls."""

    def __init__(self, error: str = "") -> None:
        self.error = error
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        code = 1 if self.error else 0
        return subprocess.CompletedProcess(command, code, "", f"hint: x\n{self.error}\nhint: y")


def test_a_peer_is_installed_once_into_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip()
    monkeypatch.setattr(subprocess, "run", pip)
    install(tmp_path, ("auto-round",))
    install(tmp_path, ("auto-round",))
    (command,) = pip.commands
    assert str(tmp_path / "auto-round") in command and "--no-deps" in command
    assert set(PEERS["auto-round"].requirements) <= set(command)
    assert refusal(tmp_path, "auto-round") is None


def test_what_fails_leaves_the_reason_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", Pip("ERROR: no matching distribution"))
    install(tmp_path, ("llama.cpp",))
    assert refusal(tmp_path, "llama.cpp") == "ERROR: no matching distribution"
    monkeypatch.setattr(subprocess, "run", Pip())
    install(tmp_path, ("llama.cpp",))
    assert refusal(tmp_path, "llama.cpp") is None
    assert not (tmp_path / "llama.cpp" / REASON).exists()


def test_an_interrupted_one_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        install(tmp_path, ("auto-round",))
    assert refusal(tmp_path, "auto-round") == "installing it was interrupted"
    monkeypatch.setattr(subprocess, "run", Pip())
    install(tmp_path, ("auto-round",))
    assert refusal(tmp_path, "auto-round") is None


def test_what_is_not_for_this_cpu_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", pip := Pip())
    monkeypatch.setattr(peers, "cpu_vendor", lambda: "GenuineIntel")
    install(tmp_path, ("zentorch",))
    reason = refusal(tmp_path, "zentorch")
    assert reason == "it is made for AuthenticAMD, and this CPU is of GenuineIntel"
    assert not pip.commands and cpu_vendor(AMD) == "AuthenticAMD" and cpu_vendor("") == "unknown"


def test_what_was_never_tried_is_named_with_its_command(tmp_path: Path) -> None:
    for root in (None, tmp_path):
        assert "benchmarks.cpu peers --peers FOLDER --names zentorch" in str(
            refusal(root, "zentorch")
        )

"""The kit for a GPU machine without network: what is built is unpacked, within the limit."""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks.gpu import first, kit
from tests.tiny import TEXT, make_model

WHEEL = "mergequant_vllm-0.1.0-py3-none-linux_x86_64.whl"


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setattr(first, "QUANTIZED", first.REHEARSED["quantized"])
    monkeypatch.setattr(first, "WINDOWS", "--window 64 --windows 2")
    # pip would fetch what builds it.
    monkeypatch.setattr(kit, "make_wheel", lambda folder: (folder / WHEEL).write_bytes(b"wheel"))
    text = tmp_path / "given.txt"
    text.write_text(TEXT * 40)
    server = [tmp_path / "server" / name for name in "ab"]
    for folder in server:
        folder.mkdir(parents=True)
        (folder / "vllm.tar").write_bytes(folder.name.encode() * 1000)
    return argparse.Namespace(
        out=tmp_path / "kit",
        model=make_model(tmp_path / "source", blocks=3),
        calibration=text,
        text=text,
        blocks=2,
        vocabulary=10**6,
        server=server,
        limit=60,
    )


def test_what_is_built_is_what_is_unpacked(given: argparse.Namespace, tmp_path: Path) -> None:
    parts = kit.build(given)
    assert [part.name for part in parts] == ["1", "2"]
    assert (parts[1] / "vllm.tar").read_bytes() == b"b" * 1000
    target = tmp_path / "there"
    # Where it is unpacked there is nothing but Python.
    code = (
        "import sys; sys.path[:0] = [sys.argv.pop(1)]; from benchmarks.gpu.kit import main; main()"
    )
    command = [sys.executable, "-I", "-c", code, str(kit.ROOT), "unpack", *map(str, parts)]
    done = subprocess.run(
        [*command, "--to", str(target)], check=True, capture_output=True, text=True
    )
    said, note = done.stdout.splitlines()
    words = shlex.split(said)
    options = first.make_parser().parse_args(words[words.index("benchmarks.gpu.first") + 1 :])
    assert json.loads((Path(options.model) / "config.json").read_text())["num_hidden_layers"] == 2
    with safe_open(Path(options.model) / "model.safetensors", framework="pt") as cut:
        blocks = {name.split(".")[2] for name in cut.keys() if ".layers." in name}  # noqa: SIM118
        kept = cut.get_tensor("model.norm.weight")
    assert blocks == {"0", "1"}
    with safe_open(given.model / "model.safetensors", framework="pt") as whole:
        assert torch.equal(kept, whole.get_tensor("model.norm.weight"))
    assert "quantization_config" in (Path(options.checkpoint) / "config.json").read_text()
    assert Path(options.text).read_text() == given.text.read_text()
    assert (target / WHEEL).read_bytes() == b"wheel"
    loss = json.loads((target / "cpu.json").read_text())["loss"]
    assert note == f"# loss on the CPU: {loss:.4f}"
    (parts[0] / "mergequant.tar.xz.1").write_bytes(b"broken")
    with pytest.raises(SystemExit, match="missing or damaged"):
        kit.unpack(parts, target)


def test_a_kit_that_does_not_fit_is_refused(
    given: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        kit, "make_content", lambda folder, _: (folder / "model").write_bytes(bytes(range(256)))
    )
    given.server, given.limit = [], 0
    with pytest.raises(SystemExit, match="give fewer --blocks"):
        kit.build(given)
    assert not given.out.exists()


def test_a_server_that_is_larger_than_a_part_is_refused_at_once(
    given: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kit, "make_content", None)  # nothing is made
    given.limit = 0
    with pytest.raises(SystemExit, match=r"server/a is larger than a part of 0 MiB: split it"):
        kit.build(given)
    assert not given.out.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"model": "missing"}, "No kit was made: Model folder '.*missing' does not exist"),
        ({"text": "missing.txt", "blocks": "2"}, r"No kit was made: .*missing\.txt"),
        ({"blocks": "4"}, "has 3 blocks: give --blocks of 1 to 3"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_built(
    given: argparse.Namespace, flags: dict[str, str], said: str
) -> None:
    files = {x: str(getattr(given, x)) for x in ("model", "calibration", "text")}
    words = [word for name, value in {**files, **flags}.items() for word in (f"--{name}", value)]
    with pytest.raises(SystemExit, match=said):
        kit.main(["build", str(given.out), *words])
    assert not given.out.exists()

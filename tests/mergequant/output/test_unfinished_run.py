"""Runs that are killed and run again: the same bytes, at most one block lost, nothing mixed."""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergequant_vllm
from mergequant import InputError, Options, cli, quantize
from mergequant.layers.in_block import load_stored
from mergequant.model.block import Block
from mergequant.output import writer as checkpoint
from mergequant.output.fingerprint import Fingerprint
from mergequant.output.unfinished_run import UnfinishedRun
from mergequant.output.writer import Writer
from mergequant.quantizer import block as quantize_block
from mergequant.quantizer import run as pipeline
from mergequant.quantizer import train_compensation as compensation
from tests.conftest import WHOLE
from tests.tiny import make_model, write_text

SHARD = "model-00001-of-00003.safetensors"
# A server that has imported everything forks the processes that are to be killed.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "mergequant.quantizer.run",
        "mergequant.cli",
        "transformers.models.llama.modeling_llama",
        __name__,
    ]
)


@pytest.fixture(autouse=True, scope="module")
def _prepared() -> Iterator[None]:
    before = torch.get_num_threads()
    _prepare()
    yield
    torch.set_num_threads(before)


def _prepare() -> None:
    torch.set_num_threads(1)  # float sums depend on how many threads share them
    gc.freeze()  # else each block's collection looks at all that was imported


def content(folder: Path) -> dict[str, object]:
    """Every file's bytes; of the report, all but time and memory."""
    files: dict[str, object] = {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }
    report = [json.loads(x) for x in (folder / checkpoint.REPORT).read_text().splitlines()]
    assert all(min(line.pop("seconds").values()) >= 0 for line in report)
    assert all(line.pop("peak_bytes")["host"] > 0 for line in report if "peak_bytes" in line)
    return {**files, checkpoint.REPORT: report}


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, _prepared: None, llama: Path, text: Path
) -> dict[str, object]:
    """What a run that nothing interrupts writes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return content(quantize(llama, output, [text], WHOLE, progress=False))


def interrupt(model: Path, output: Path, text: Path, options: Options = WHOLE) -> None:
    """Ctrl-C after the first block."""
    with pytest.MonkeyPatch.context() as patch:
        _before(patch, Writer, "write_block", lambda count, *_: count == 2, _raise)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, output, [text], options, progress=False)


@pytest.fixture(scope="module")
def unfinished(
    tmp_path_factory: pytest.TempPathFactory, _prepared: None, llama: Path, text: Path
) -> Path:
    """An output with the first of two blocks finished; to be copied."""
    output = tmp_path_factory.mktemp("unfinished") / "out"
    interrupt(llama, output, text)
    return output


When = Callable[..., bool]


def _before(patch: Any, owner: object, name: str, when: When, act: Callable[[], object]) -> None:
    """Have `act` called instead of `owner.name`, once `when(number of the call, *arguments)`."""
    original, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if when(calls, *arguments):
            if name == "save_file":
                Path(arguments[1]).write_bytes(b"half of a shard")
            act()
        return original(*arguments, **keywords)

    patch.setattr(owner, name, counted)


def _raise() -> None:
    raise KeyboardInterrupt


def _moves(name: str) -> When:
    def when(_: int, source: Path, target: Path) -> bool:
        return target.name == name and source.parent != target.parent

    return when


def _forgets_moving(_: int, path: Path, *__: object) -> bool:
    return path.name == "publishing.json" and (path.parent.parent / "config.json").exists()


# Where each run is killed that goes on from the one before, and the blocks then finished.
KILLED: list[tuple[object, str, When, int]] = [
    (quantize_block, "quantize_linears", lambda count, *_: count == 3, 0),  # in the first block
    (checkpoint, "save_file", lambda *_: True, 0),
    (UnfinishedRun, "write_record", lambda *_: True, 0),
    (compensation, "_loss", lambda count, *_: count == 2, 0),  # after an epoch
    (pipeline.Decoder, "block", lambda count, *_: count == 6, 1),  # after the pilots' four, and one
    (quantize_block, "quantize_linears", lambda count, *_: count == 4, 1),  # in the second
    (checkpoint, "save_file", lambda count, *_: count == 2, 2),  # what is around the blocks
    (os, "replace", _moves(SHARD.replace("00001", "00002", 1)), 2),
    (os, "replace", _moves("config.json"), 2),
    (Path, "unlink", _forgets_moving, 2),
]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _run_and_die(number: int, model: Path, output: Path, text: Path) -> None:
    _prepare()
    owner, name, when, _ = KILLED[number]
    _before(pytest.MonkeyPatch(), owner, name, when, _die)
    quantize(model, output, [text], WHOLE, progress=False)


def _run(target: Callable[..., None], *arguments: object) -> int | None:
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, llama: Path, text: Path, whole: dict[str, object]
) -> None:
    output = tmp_path / "out"
    for number, (_, name, _, finished) in enumerate(KILLED):
        assert _run(_run_and_die, number, llama, output, text) == -signal.SIGKILL, name
        assert len(list((output / ".partial").glob("model-*.json"))) == finished, name
        complete = number == len(KILLED) - 1
        assert (output / "config.json").exists() == complete, name
    quantize(llama, output, [text], WHOLE, progress=False)
    assert content(output) == whole


def _run_and_be_terminated(model: Path, output: Path, text: Path, log: Path) -> None:
    _prepare()
    sys.stderr = log.open("w")
    sys.argv = ["mergequant", "quantize", str(model), str(output), "--calibration", str(text)]
    for option in sorted(WHOLE.model_fields_set):
        value, flag = getattr(WHOLE, option), option.replace("_", "-")
        if isinstance(value, bool):
            sys.argv.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            sys.argv += [f"--{flag}", str(value)]

    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    _before(pytest.MonkeyPatch(), Writer, "write_block", lambda count, *_: count == 2, terminate)
    cli.main()


def test_a_terminated_command_keeps_its_blocks_and_says_how_to_go_on(
    tmp_path: Path,
    llama: Path,
    text: Path,
    whole: dict[str, object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    assert _run(_run_and_be_terminated, llama, output, text, log) == 143
    assert [path.name for path in output.iterdir()] == [".partial"]
    said = f"1 of 2 blocks are finished: run the same command again to continue, or remove {output}"
    assert said in log.read_text()
    quantize(llama, output, [text], WHOLE)
    assert "Block 1/2:  50%" in capsys.readouterr().err
    assert content(output) == whole


EVERY_TENSOR: dict[str, object] = {
    "weight_bits": 3,
    "group_size": 32,
    "asymmetric": True,
    "reconstruction": "pad",
    "max_extra_channels": 0.5,
    "staggered": True,
    "rotation": "online",
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("qwen3", {}), ("qwen2", {}), ("qwen3", EVERY_TENSOR)],
    ids=["usual", "biases", "every tensor"],
)
def test_hidden_states_are_computed_again_from_what_is_stored(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    text: Path,
    kind: str,
    changes: dict[str, object],
) -> None:
    """Also where that is 16 bits: biases, norms over heads, folded norms."""
    dtype = torch.bfloat16
    model = make_model(tmp_path / "model", kind, dtype=dtype, tied=True)
    options = Options.model_validate({**WHOLE.model_dump(), **changes})
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "load_stored", _load_and_compare)
        quantize(model, tmp_path / "whole", [text], options, progress=False)
    interrupt(model, tmp_path / "out", text, options)
    again = quantize(model, tmp_path / "out", [text], options, progress=False)
    assert content(again) == content(tmp_path / "whole")


def _load_and_compare(block: Block, *arguments: Any) -> None:
    """What calibrated the later stages of the block is what is stored."""
    hidden = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))
    in_memory = block.forward(hidden)
    load_stored(block, *arguments)
    assert torch.equal(block.forward(hidden), in_memory)


def _other_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][5, 5] += 1e-3
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def _other_config(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-3}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("text", "other calibration text (sha256 "),
        ("option", "--damping 0.01, not 0.02:"),
        ("release", f"mergequant-vllm {mergequant_vllm.__version__}, not 9.9:"),
        ("weights", "other weights in model.safetensors (sha256 "),
        ("config", "another config.json of the model:"),
        ("fingerprint", "its fingerprint.json is damaged:"),
    ],
)
def test_a_run_begun_otherwise_is_refused_and_kept(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    llama: Path,
    text: Path,
    unfinished: Path,
    change: str,
    expected: str,
) -> None:
    model, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(llama, model)
    shutil.copytree(unfinished, output)
    options = WHOLE
    if change == "text":
        text = write_text(tmp_path / "other.txt", repeats=199)
    elif change == "option":
        options = WHOLE.model_copy(update={"damping": 0.02})
    elif change == "release":
        monkeypatch.setattr(mergequant_vllm, "__version__", "9.9")
    elif change == "fingerprint":
        (output / ".partial" / "fingerprint.json").write_text("{}")
    else:
        {"weights": _other_weights, "config": _other_config}[change](model)
    before = {path.name: path.read_bytes() for path in (output / ".partial").iterdir()}
    with pytest.raises(InputError) as refusal:
        quantize(model, output, [text], options, progress=False)
    message = str(refusal.value)
    assert expected in message and f"remove {output}/.partial" in message
    after = {path.name: path.read_bytes() for path in (output / ".partial").iterdir()}
    assert {**after, "lock": b""} == {**before, "lock": b""}


def test_a_damaged_block_is_quantized_again(
    tmp_path: Path,
    llama: Path,
    text: Path,
    unfinished: Path,
    whole: dict[str, object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "out"
    shutil.copytree(unfinished, output)
    _flip_a_bit(output / ".partial" / SHARD)
    quantize(llama, output, [text], WHOLE, progress=False)
    assert f"{SHARD} is damaged: its block is quantized again" in caplog.text
    assert content(output) == whole


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda shard: os.truncate(shard, 10),
    "flipped": _flip_a_bit,
    "missing": lambda shard: shard.unlink(),
    "broken record": lambda shard: shard.with_suffix(".json").write_text("{"),
    "no record": lambda shard: shard.with_suffix(".json").unlink(),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_blocks_after_a_damaged_one_are_dropped(tmp_path: Path, damage: str) -> None:
    given, staging = _fingerprint(), tmp_path / "out" / ".partial"
    with Writer(tmp_path / "out", shards=4) as writer:
        writer.begin(given)
        for number in range(3):
            writer.write_block(number, {f"{number}.weight": torch.ones(3)}, [])
    DAMAGES[damage](staging / "model-00002-of-00004.safetensors")
    with Writer(tmp_path / "out", shards=4) as writer:
        writer.begin(given)
        assert writer.finished == 1
        left = sorted(path.name for path in staging.iterdir())
        first = ["model-00001-of-00004.json", "model-00001-of-00004.safetensors"]
        assert left == ["fingerprint.json", "lock", *first]
        assert torch.equal(writer.read_block(0)["0.weight"], torch.ones(3))


def _fingerprint() -> Fingerprint:
    return Fingerprint(
        format_version=1,
        versions={},
        options={},
        config_sha256="",
        weights_sha256={},
        calibration_sha256="",
    )


def test_a_second_run_on_the_same_output_is_refused(
    tmp_path: Path, llama: Path, text: Path, unfinished: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(unfinished, output)
    with Writer(output, shards=3):
        with pytest.raises(InputError, match=rf"Another run \(process {os.getpid()}\) is writing"):
            quantize(llama, output, [text], WHOLE, progress=False)
        assert (output / ".partial" / SHARD).exists()
    with Writer(output, shards=3) as writer:
        assert writer.finished == 0  # until the run says what it is


def test_a_finished_checkpoint_is_refused(
    llama: Path, text: Path, checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(checkpoint, output)
    with pytest.raises(InputError, match="is not empty"):
        quantize(llama, output, [text], WHOLE, progress=False)
    assert not (output / ".partial").exists()

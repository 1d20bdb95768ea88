"""Perplexity through the reference forward, and what is refused before an engine starts."""

import json
import math
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from mergequant import InputError, perplexity
from mergequant.calibration.tokenizer import load_tokenizer
from mergequant.evaluate.perplexity import refuse_no_window, require_vllm, text_windows, vllm_engine
from mergequant.evaluate.reference_forward import load_model
from tests.tiny import make_model

LENGTH, WINDOWS = 32, 3


def test_perplexity_is_that_of_cross_entropy(llama: Path, text: Path) -> None:
    evaluation = perplexity(
        llama, text, engine="transformers", window=LENGTH, most_windows=WINDOWS, progress=False
    )
    ids = torch.tensor(load_tokenizer(llama)(text.read_text())["input_ids"])
    windows = ids[: WINDOWS * LENGTH].reshape(WINDOWS, LENGTH)
    with torch.no_grad():
        logits = load_model(llama)(windows, use_cache=False).logits[:, :-1].to(torch.float64)
    loss = float(cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
    # The same logits; each of some hundred float64 terms is rounded a few times.
    assert math.isclose(evaluation.loss, loss, rel_tol=1e-12)
    assert evaluation.perplexity == math.exp(evaluation.loss)
    assert (evaluation.tokens, evaluation.windows) == (93, WINDOWS)
    assert evaluation.window_length == LENGTH


def test_a_model_that_lacks_weights_is_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"lacks 9 weights that a llama has \(model\.layers\.2\."):
        perplexity(folder, text, engine="transformers", window=LENGTH, progress=False)


def test_windows_are_the_first_of_a_text(llama: Path, text: Path) -> None:
    tokenizer = load_tokenizer(llama)
    every = text_windows(text, tokenizer, LENGTH, None)
    assert len(every) > WINDOWS
    assert torch.equal(text_windows(text, tokenizer, LENGTH, WINDOWS), every[:WINDOWS])


@pytest.mark.parametrize(("window", "most"), [(1, None), (0, 5), (2, 0), (2048, -1)])
def test_no_token_to_predict_is_refused(window: int, most: int | None) -> None:
    with pytest.raises(InputError, match=r"needs 2 tokens .* raise --window\(s\)\."):
        refuse_no_window(window, most)
    refuse_no_window(2, 1)
    refuse_no_window(2, None)


class FakeEngine:
    """Stands for `vllm.LLM`: every token has log-probability -2."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.cache_space = os.environ["VLLM_CPU_KVCACHE_SPACE"]
        self.stopping = threading.Event()
        self.receiver = threading.Thread(target=self.receive, daemon=True)
        self.receiver.start()
        core = SimpleNamespace(shutdown=self.stop, output_queue_thread=self.receiver)
        self.llm_engine = SimpleNamespace(engine_core=core)

    @property
    def stopped(self) -> bool:
        """Whether the engine was shut down and its thread has ended."""
        return self.stopping.is_set() and not self.receiver.is_alive()

    def stop(self, timeout: float) -> None:
        self.stopping.set()

    def receive(self) -> None:
        """Receive outputs, and end a moment after the engine."""
        self.stopping.wait()
        time.sleep(0.1)

    def generate(self, prompts: list[Any], *_: object, use_tqdm: bool) -> list[Any]:
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        scored = [[None, *({token: SimpleNamespace(logprob=-2.0)} for token in x[1:])] for x in ids]
        pairs = zip(ids, scored, strict=True)
        return [SimpleNamespace(prompt_token_ids=x, prompt_logprobs=y) for x, y in pairs]


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What the engine sets in the environment, where it is not set, does not outlive the test."""
    names = ("LOGGING_LEVEL", "LOGGING_STREAM", "CPU_KVCACHE_SPACE", "ALLOW_LONG_MAX_MODEL_LEN")
    for name in names:
        monkeypatch.setenv(f"VLLM_{name}", "")
    return monkeypatch


@pytest.fixture
def fake(no_settings: pytest.MonkeyPatch) -> list[FakeEngine]:
    """The engines that are started."""
    started: list[FakeEngine] = []

    def start(**arguments: Any) -> FakeEngine:
        started.append(FakeEngine(**arguments))
        return started[-1]

    module = SimpleNamespace(LLM=start, SamplingParams=lambda **_: None)
    no_settings.setitem(sys.modules, "vllm", module)
    return started


def test_a_served_model_is_asked_for_whole_windows(
    fake: list[FakeEngine], llama: Path, text: Path
) -> None:
    evaluation = perplexity(llama, text, window=LENGTH, most_windows=WINDOWS, dtype="bfloat16")
    assert (evaluation.loss, evaluation.engine) == (2.0, "vllm")
    assert evaluation.tokens == WINDOWS * (LENGTH - 1)
    assert [engine.arguments for engine in fake] == [
        {
            "model": str(llama),
            "dtype": "bfloat16",
            "tensor_parallel_size": 1,
            "enforce_eager": True,
            "trust_remote_code": False,
            "max_model_len": LENGTH + 1,  # one token is generated
            "hf_overrides": {"architectures": ["LlamaForCausalLM"]},
        }
    ]
    assert fake[0].stopped


def test_vllm_is_told_what_a_16_bit_model_says_under_other_names(
    fake: list[FakeEngine], tmp_path: Path, text: Path
) -> None:
    model = make_model(tmp_path / "model", "ministral3")
    perplexity(model, text, window=LENGTH, most_windows=1)
    scaling = {"original_max_position_embeddings": 16, "beta": 0.2}
    assert fake[0].arguments["hf_overrides"]["llama_4_scaling"] == scaling


def test_an_engine_is_started_at_once_and_stopped_whatever_happens(
    fake: list[FakeEngine], llama: Path
) -> None:
    context = vllm_engine(llama)
    assert len(fake) == 1 and not fake[0].stopped
    assert context.__enter__() is fake[0] and not fake[0].stopped
    assert not context.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert fake[0].stopped


def test_an_engine_that_runs_in_this_process_has_no_thread_to_wait_for(
    fake: list[FakeEngine], llama: Path
) -> None:
    with vllm_engine(llama) as engine:
        del engine.llm_engine.engine_core.output_queue_thread
    assert fake[0].stopping.is_set()


def test_each_engine_has_the_cache_of_its_own_context(
    fake: list[FakeEngine], llama: Path, no_settings: pytest.MonkeyPatch
) -> None:
    no_settings.delenv("VLLM_CPU_KVCACHE_SPACE")
    # Keys and values of 2 blocks with 32 channels in float32 take 512 bytes a token.
    with vllm_engine(llama, max_model_len=64), vllm_engine(llama, max_model_len=2**22):
        assert [engine.cache_space for engine in fake] == ["1", "3"]
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ
    no_settings.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    with vllm_engine(llama):
        assert fake[-1].cache_space == os.environ["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "7"


def test_without_vllm_one_sentence(no_settings: pytest.MonkeyPatch, llama: Path) -> None:
    no_settings.setitem(sys.modules, "vllm", None)
    sentence = r'pip install "mergequant-vllm\[cuda\]" or \[cpu\], or use --engine transformers\.'
    with pytest.raises(InputError, match=sentence):
        require_vllm()
    with pytest.raises(InputError, match=sentence):
        vllm_engine(llama)

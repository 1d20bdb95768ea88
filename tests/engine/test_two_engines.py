"""Engines one after another in a process: each with its own cache, each ended with its threads."""

import os
import threading
from pathlib import Path

import pytest
import torch

from mergequant.evaluate.perplexity import prompt_logprobs, vllm_engine
from tests.tiny import make_model

pytestmark = pytest.mark.engine

# Keys and values of two blocks, 2048 channels each in float32, take 32 KiB a token: the longer
# context needs 1.2 GiB, and the shorter one is given 1 GiB.
HEADS, SHORT, LONG = 64, 64, 40_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's cache has its size by a variable")
def test_a_second_engine_may_have_a_longer_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    model = make_model(tmp_path / "model", heads=HEADS, kv_heads=HEADS, context=LONG)
    windows = torch.randint(2, 250, (2, 48), generator=torch.Generator().manual_seed(0))
    before = dict(os.environ)
    logprobs, cache = [], []
    for context in (SHORT, LONG):
        with vllm_engine(
            model, dtype="float32", enforce_eager=True, max_model_len=context, max_num_seqs=2
        ) as llm:
            logprobs.append(prompt_logprobs(llm, windows))
            cache.append(llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes)
        names = [thread.name for thread in threading.enumerate()]
        assert "EngineCoreOutputQueueThread" not in names
    assert cache == [2**30, 2 * 2**30]
    assert torch.allclose(*logprobs, atol=1e-4)
    own = ("CPU_KVCACHE_SPACE", "LOGGING_LEVEL", "LOGGING_STREAM", "ALLOW_LONG_MAX_MODEL_LEN")
    for name in (f"VLLM_{name}" for name in own):
        assert os.environ.get(name) == before.get(name)

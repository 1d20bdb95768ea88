"""What vLLM does around the model: chunked prefill, prefix caching, speculation."""

from pathlib import Path
from typing import Any

import pytest

from mergequant.evaluate.perplexity import vllm_engine
from tests.engine.conftest import Reference, check_greedy

pytestmark = pytest.mark.engine

PROMPT, GENERATED = 160, 48


def check_generations(llm: Any, reference: Reference) -> list[Any]:
    """Greedy continuations of long prompts are the reference's; returns vLLM's outputs."""
    from vllm import SamplingParams

    prompts = reference.windows[:6, :PROMPT].tolist()
    sampling = SamplingParams(temperature=0.0, max_tokens=GENERATED, ignore_eos=True)
    outputs: list[Any] = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    clear = sum(
        check_greedy(reference, ids, list(output.outputs[0].token_ids))
        for ids, output in zip(prompts, outputs, strict=True)
    )
    assert clear > 0.5 * len(prompts) * GENERATED
    return outputs


def test_chunked_prefill_prefix_caching_and_speculation(
    served: Path, references: dict[int, Reference]
) -> None:
    """Prompts longer than a step, asked for twice, with drafts from the prompt's own n-grams."""
    with vllm_engine(
        served,
        quantization="mergequant",
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_batched_tokens=64,
        max_num_seqs=16,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
        },
        disable_log_stats=False,
    ) as llm:
        first = check_generations(llm, references[1])
        again = check_generations(llm, references[1])
        drafted = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    assert all(not output.num_cached_tokens for output in first)
    assert all(output.num_cached_tokens > 0 for output in again)
    assert drafted["vllm:spec_decode_num_accepted_tokens"] > 0

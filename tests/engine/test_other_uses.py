"""Uses of a checkpoint beside serving it: as a draft model, without its weights, or by mistake."""

from pathlib import Path

import pytest

from mergequant.evaluate.perplexity import vllm_engine

pytestmark = pytest.mark.engine
SETTINGS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128}
TOKENS = 24


def generated(folder: Path, **arguments: object) -> list[int]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    with vllm_engine(folder, **SETTINGS, **arguments) as llm:
        (output,) = llm.generate([{"prompt_token_ids": list(range(5, 29))}], sampling)
        return list(output.outputs[0].token_ids)


def test_a_checkpoint_drafts_for_the_model_that_it_was_made_of(trained: Path, served: Path) -> None:
    draft = {"model": str(served), "method": "draft_model", "num_speculative_tokens": 2}
    # What is drafted changes how fast tokens come, not which.
    assert generated(trained, speculative_config=draft) == generated(trained)


def test_a_checkpoint_is_served_without_its_weights(served: Path) -> None:
    assert len(generated(served, load_format="dummy")) == TOKENS


def test_a_model_in_16_bits_is_not_served_as_a_checkpoint(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"not a mergequant checkpoint: its config.json has no"):
        generated(trained, quantization="mergequant")

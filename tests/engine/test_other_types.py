"""Models that differ from Llama in what is not stored, served, against the reference.

That is factors of embedding, residual stream and logits, and the kind of rotary positions.
"""

from pathlib import Path

import pytest

from mergequant import quantize
from mergequant.evaluate.perplexity import prompt_logprobs
from tests.conftest import SMALL
from tests.engine.conftest import float32_engine, make_reference
from tests.tiny import make_model, write_text

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("model_type", "eager"), [("granite", True), ("granite", False), ("ernie4_5", False)]
)
def test_log_probabilities_are_the_references(tmp_path: Path, model_type: str, eager: bool) -> None:
    text = write_text(tmp_path / "text.txt", repeats=40)
    model = make_model(tmp_path / "model", model_type, context=512, tied=True)
    folder = quantize(model, tmp_path / "served", [text], SMALL, progress=False)
    reference = make_reference(folder, text, ranks=1, most=8)
    with float32_engine(folder, eager=eager, ranks=1) as llm:
        served = prompt_logprobs(llm, reference.windows)
    assert float((served - reference.logprobs).abs().mean()) <= reference.control_mean

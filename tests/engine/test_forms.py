"""Stored forms that the other engines leave out, served at once: padding, offsets, groups, zero
points, 3-bit weights, 8-bit static activations, the online rotation, a head that stays as it is;
compiled, on two ranks. Each form and kernel alone: tests/mergequant_vllm/test_stored_forms.py."""

from pathlib import Path

import pytest

from mergequant import Options, quantize
from mergequant.evaluate.perplexity import prompt_logprobs
from tests.engine.conftest import float32_engine, make_reference

pytestmark = pytest.mark.engine

FORMS = Options(
    statistics_samples=8,
    gptq_samples=16,
    sequence_length=240,
    compensation_rank=0,
    rotation="online",
    reconstruction="pad",
    alpha=0.0,
    max_extra_channels=0.25,
    weight_bits=3,
    group_size=32,
    asymmetric=True,
    static_bits=8,
    head_bits=16,
)


def test_log_probabilities_are_the_references(
    tmp_path: Path, trained: Path, calibration_text: Path
) -> None:
    folder = quantize(trained, tmp_path / "forms", [calibration_text], FORMS, progress=False)
    reference = make_reference(folder, trained / "heldout.txt", ranks=2, most=24)
    with float32_engine(folder, eager=False, ranks=2) as llm:
        served = prompt_logprobs(llm, reference.windows)
    assert float((served - reference.logprobs).abs().mean()) <= reference.control_mean

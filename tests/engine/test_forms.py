"""Every stored form at once, served: reconstruction, offsets, groups, zero points, 3-bit weights,
the online rotation."""

from pathlib import Path

import pytest

from mergequant import Options, quantize
from mergequant.evaluate import prompt_logprobs, vllm_engine
from tests.engine.conftest import make_oracle

pytestmark = pytest.mark.engine

EVERYTHING = Options(
    rotation="online",
    reconstruction="pad",
    alpha=1.0,
    split_by="folded",
    staggered=True,
    weight_bits=3,
    group_size=64,
    asymmetric=True,
    statistics_samples=8,
    gptq_samples=16,
    sequence_length=240,
)


def test_log_probabilities_are_the_oracles(tmp_path: Path, trained: Path) -> None:
    text, heldout = tmp_path / "calibration.txt", trained / "heldout.txt"
    text.write_text((trained / "train.txt").read_text()[:60_000])
    folder = quantize(trained, tmp_path / "forms", [text], EVERYTHING, progress=False)
    oracle = make_oracle(folder, heldout, ranks=1, most=24)
    with vllm_engine(
        folder, quantization="mergequant", dtype="float32", enforce_eager=True, max_model_len=256
    ) as llm:
        served = prompt_logprobs(llm, oracle.windows)
    assert float((served - oracle.logprobs).abs().mean()) <= oracle.control_mean

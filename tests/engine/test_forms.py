"""Every stored form, served: reconstruction, offsets, groups, zero points, 3- and 8-bit weights,
8-bit activations, both rotations, an 8-bit head; eager and compiled, on one rank and on two."""

from pathlib import Path

import pytest

from mergequant import Options, quantize
from mergequant.evaluate import prompt_logprobs
from tests.engine.conftest import float32_engine, make_oracle

pytestmark = pytest.mark.engine

LITTLE = Options(
    statistics_samples=8,
    gptq_samples=16,
    sequence_length=240,
    compensation_rank=0,
    max_extra_channels=0.25,
)
NARROW = LITTLE.model_copy(
    update={
        "rotation": "online",
        "reconstruction": "pad",
        "alpha": 0.0,
        "weight_bits": 3,
        "group_size": 32,
        "asymmetric": True,
        "head_bits": 8,
    }
)
WIDE = LITTLE.model_copy(
    update={
        "rotation": "offline",
        "reconstruction": "prune",
        "alpha": 2.0,
        "staggered": False,
        "weight_bits": 8,
        "static_bits": 8,
        "dynamic_bits": 8,
    }
)


@pytest.mark.parametrize(
    ("options", "eager", "ranks"),
    [(NARROW, False, 2), (WIDE, True, 1)],
    ids=["narrow-compiled-2", "wide-eager-1"],
)
def test_log_probabilities_are_the_oracles(
    tmp_path: Path,
    trained: Path,
    options: Options,
    eager: bool,
    ranks: int,
) -> None:
    text, heldout = tmp_path / "calibration.txt", trained / "heldout.txt"
    text.write_text((trained / "train.txt").read_text()[:60_000])
    folder = quantize(trained, tmp_path / "forms", [text], options, progress=False)
    oracle = make_oracle(folder, heldout, ranks=ranks, most=24)
    with float32_engine(folder, eager, ranks) as llm:
        served = prompt_logprobs(llm, oracle.windows)
    assert float((served - oracle.logprobs).abs().mean()) <= oracle.control_mean

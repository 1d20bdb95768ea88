"""The method's claim on a trained model: outliers cost step migration nothing, and per-token
quantization everything. Through the reference, which the engine tests hold vLLM against."""

from pathlib import Path

import pytest

from mergequant import Options, perplexity, quantize
from tests.outliers import with_outliers

SAMPLES = {
    "statistics_samples": 16,
    "gptq_samples": 32,
    "sequence_length": 240,
    "rotation": "none",  # it would spread the outliers
    "reconstruction": "none",
    "compensation_rank": 0,
}
STATIC = Options.model_validate(SAMPLES)
DYNAMIC = Options.model_validate(
    {**SAMPLES, "activations": "dynamic", "weights": "rtn", "clipping": "none"}
)


def loss(folder: Path, text: Path) -> float:
    evaluation = perplexity(
        folder, text, engine="transformers", window=240, most_windows=24, progress=False
    )
    return evaluation.loss


@pytest.mark.timeout(900)
def test_outliers_cost_step_migration_nothing(tmp_path: Path, trained: Path) -> None:
    text, heldout = trained / "train.txt", trained / "heldout.txt"
    spiked = with_outliers(trained, tmp_path / "spiked")
    full = loss(trained, heldout)
    # bfloat16 rounds the rescaled weights anew.
    assert loss(spiked, heldout) == pytest.approx(full, abs=0.01)
    losses = {
        (name, variant): loss(
            quantize(source, tmp_path / f"{name}-{variant}", [text], options, progress=False),
            heldout,
        )
        for name, source in (("plain", trained), ("spiked", spiked))
        for variant, options in (("static", STATIC), ("dynamic", DYNAMIC))
    }
    assert abs(losses["spiked", "static"] - losses["plain", "static"]) < 0.02
    assert losses["plain", "static"] - full < 0.32
    assert losses["plain", "static"] < losses["plain", "dynamic"]
    assert losses["spiked", "dynamic"] - full > 2 * 0.32

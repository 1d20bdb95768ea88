"""Every stored form, served: reconstruction, offsets, groups, zero points, 3- and 8-bit weights,
8-bit activations, both rotations; eager and compiled, on one rank and on two."""

import os
from pathlib import Path

import pytest
import torch

from mergequant import Options, quantize
from mergequant.evaluate import prompt_logprobs, vllm_engine
from tests.engine.conftest import make_oracle

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
    monkeypatch: pytest.MonkeyPatch,
    options: Options,
    eager: bool,
    ranks: int,
) -> None:
    if 0 < torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks need {ranks} GPUs")
    cores = sorted(os.sched_getaffinity(0))
    if ranks > 1 and len(cores) >= ranks:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, cores[:ranks])))
    text, heldout = tmp_path / "calibration.txt", trained / "heldout.txt"
    text.write_text((trained / "train.txt").read_text()[:60_000])
    folder = quantize(trained, tmp_path / "forms", [text], options, progress=False)
    oracle = make_oracle(folder, heldout, ranks=ranks, most=24)
    with vllm_engine(
        folder,
        quantization="mergequant",
        dtype="float32",
        enforce_eager=eager,
        tensor_parallel_size=ranks,
        max_model_len=256,
    ) as llm:
        served = prompt_logprobs(llm, oracle.windows)
    assert float((served - oracle.logprobs).abs().mean()) <= oracle.control_mean

"""A checkpoint whose layers differ, on one rank and on two: the reference's log-probabilities.

Two layers at 8 bits, one left in 16, one with zero points everywhere, one with three segments of
sorted columns, one whose K differs; heads mixed in front of o.
"""

from pathlib import Path

import pytest

from mergequant import Options, quantize
from mergequant.evaluate.perplexity import prompt_logprobs
from mergequant.model.reader import Reader
from mergequant_vllm.format import CheckpointFormat, parse
from tests.engine.conftest import float32_engine, make_reference

pytestmark = pytest.mark.engine

OPTIONS = Options(
    statistics_samples=8,
    gptq_samples=16,
    sequence_length=240,
    compensation_rank=0,
    reconstruction="none",
    rotation="online",
    mix_heads=3,
    hadamard_block=32,
    static_zero_points=False,
    ignore=("model.layers.1.self_attn.o_proj",),
    overrides={
        r"re:model\.layers\.[01]\.mlp\.down_proj": {"weight_bits": 8, "dynamic_bits": 8},
        r"re:model\.layers\.1\.self_attn\.[qkv]_proj": {
            "asymmetric": True,
            "static_zero_points": True,
        },
        "model.layers.0.self_attn.o_proj": {"dynamic_zero_points": True},
        r"re:model\.layers\.0\.mlp\.(gate|up)_proj": {"segments": 3},
        r"re:model\.layers\.1\.mlp\.(gate|up)_proj": {
            "reconstruction": "pad",
            "alpha": 0.0,
            "max_extra_channels": 0.25,
        },
    },
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, trained: Path, calibration_text: Path) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    return quantize(trained, folder / "out", [calibration_text], OPTIONS, progress=False)


def contract(folder: Path) -> CheckpointFormat:
    return parse(Reader(folder).config["quantization_config"])


def test_each_layer_is_as_it_was_asked_for(mixed: Path) -> None:
    checkpoint = contract(mixed)
    quantized = checkpoint.quantized
    assert "model.layers.1.self_attn.o_proj" not in quantized
    for number in range(2):
        down = quantized[f"model.layers.{number}.mlp.down_proj"]
        assert (down.weight.bits, down.input.bits) == (8, 8)
    zeroed = quantized["model.layers.1.self_attn.k_proj"]
    assert zeroed.weight.zero_points and zeroed.input.zero_points
    assert zeroed.output_offset == "float32"
    assert quantized["model.layers.0.self_attn.o_proj"].input.zero_points
    assert len(quantized["model.layers.0.mlp.up_proj"].weight.segments or ()) == 3
    columns = {name: linear.in_features for name, linear in quantized.items() if "up_proj" in name}
    assert len(set(columns.values())) == 2
    assert len(checkpoint.targets) < len(quantized)


@pytest.mark.parametrize("ranks", [1, 2])
def test_log_probabilities_are_the_references(mixed: Path, trained: Path, ranks: int) -> None:
    reference = make_reference(mixed, trained / "heldout.txt", ranks=ranks, most=24)
    with float32_engine(mixed, eager=ranks == 1, ranks=ranks) as llm:
        served = prompt_logprobs(llm, reference.windows)
    assert float((served - reference.logprobs).abs().mean()) <= reference.control_mean

"""Every option of storage and method: what is written is the model, as close as its bits allow."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mergequant import Options, quantize
from mergequant.calibration.tokenizer import load_tokenizer
from mergequant.evaluate.reference_forward import load_model
from mergequant.model.architectures import find
from mergequant.model.reader import Reader
from mergequant.quantizer.forms import linear_forms
from mergequant_vllm.format import CheckpointFormat, parse
from tests.conftest import SMALL
from tests.tiny import TEXT, make_model

EIGHT: dict[str, Any] = {"weight_bits": 8, "static_bits": 8, "dynamic_bits": 8}
PAD: dict[str, Any] = {"reconstruction": "pad", "alpha": 1.0, "max_extra_channels": 0.5}

OPTIONS: dict[str, dict[str, Any]] = {
    "asymmetric": {"asymmetric": True},
    "groups": {"group_size": 32},
    "asymmetric groups, searched": {
        "group_size": 64,
        "asymmetric": True,
        "weight_search": "mse",
    },
    "pad": PAD,
    "pad, staggered, by folded size": {**PAD, "staggered": True, "split_by": "folded"},
    "pad, asymmetric": {**PAD, "asymmetric": True},
    "pad, nothing strong": {**PAD, "alpha": 50.0, "staggered": True},
    "rotation offline": {"rotation": "offline"},
    "rotation online": {"rotation": "online"},
    "rotation online, heads mixed": {"rotation": "online", "mix_heads": 2},
    "rotation online, small blocks": {"rotation": "online", "hadamard_block": 2},
    "rotation online, some left in 16 bits": {
        "rotation": "online",
        "mix_heads": 2,
        "ignore": ("re:.*[.]0[.].*[.]o_proj", "re:.*[.]1[.].*[.]down_proj"),
    },
    "segments": {"segments": 2},
    "segments, pad": {**PAD, "segments": 3, "asymmetric": True},
    # They fit the text that they were found on: what lies beyond it is clipped on both sides.
    "zero points of static inputs": {"static_zero_points": True, "statistics_samples": 64},
    "zero points of static inputs, pad, staggered": {
        **PAD,
        "staggered": True,
        "static_zero_points": True,
        "statistics_samples": 64,
    },
    "zero points per token": {"dynamic_zero_points": True},
    "all of it": {**PAD, "staggered": True, "rotation": "online", "group_size": 32},
}


def contract(folder: Path) -> CheckpointFormat:
    return parse(Reader(folder).config["quantization_config"])


def distance(folder: Path, source: Path) -> float:
    """Relative difference of the logits of two models on a text like the calibration's."""
    tokenizer = load_tokenizer(source)
    ids = torch.tensor([tokenizer.encode(f"{i} {TEXT}")[:64] for i in range(40, 44)])
    with torch.no_grad():
        ours, theirs = (load_model(path)(ids).logits for path in (folder, source))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: make_model(folder / name, name) for name in ("llama", "qwen2")}


@pytest.fixture(scope="module")
def plain(
    tmp_path_factory: pytest.TempPathFactory, text: Path, sources: dict[str, Path]
) -> dict[str, float]:
    """How far 8 bits alone are away; about 0.02, from what the calibration did not see."""
    options, distances = SMALL.model_copy(update=EIGHT), {}
    for name, source in sources.items():
        output = tmp_path_factory.mktemp("plain") / name
        folder = quantize(source, output, [text], options, progress=False)
        distances[name] = distance(folder, source)
        # 8 bits leave 0.02 of these random models: a pipeline that is wrong everywhere shows here.
        assert distances[name] < 0.03
    return distances


DECIDED = {
    "activations": "fully_static",
    "rotation": "none",
    "reconstruction": "none",
    "alpha": 0.0,
}


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, 64),
        ({"group_size": 128}, 128),
        ({"overrides": {"re:.*down_proj": {"group_size": 32}}}, 32),
        ({"overrides": {"re:.*down_proj": {"group_size": None}}}, None),
        ({"overrides": {"re:.*down_proj": {"weight_bits": 8}}}, 64),
    ],
)
def test_a_fully_static_down_has_groups_unless_they_are_chosen(
    llama: Path, fields: dict[str, Any], size: int | None
) -> None:
    options = Options.model_validate({**DECIDED, **fields})
    forms = dict(linear_forms(find("llama"), Reader(llama).config, options))
    down = forms["model.layers.0.mlp.down_proj"]
    assert down is not None and down.weight.group_size == size


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_with_8_bits_it_is_still_the_same_model(
    tmp_path: Path,
    text: Path,
    sources: dict[str, Path],
    plain: dict[str, float],
    model_type: str,
    name: str,
) -> None:
    source = sources[model_type]
    options = SMALL.model_copy(update={**EIGHT, **OPTIONS[name]})
    folder = quantize(source, tmp_path / "out", [text], options, progress=False)
    assert distance(folder, source) < 1.25 * plain[model_type]


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_three_bits_are_further_away_than_four(
    tmp_path: Path, llama: Path, text: Path, group_size: int | None, asymmetric: bool
) -> None:
    distances = {}
    for bits in (3, 4, 8):
        update = {**EIGHT, "weight_bits": bits}
        update |= {"group_size": group_size, "asymmetric": asymmetric}
        options = SMALL.model_copy(update=update)
        folder = quantize(llama, tmp_path / str(bits), [text], options, progress=False)
        weight = contract(folder).quantized["model.layers.1.mlp.up_proj"].weight
        assert (weight.bits, weight.group_size) == (bits, group_size)
        distances[bits] = distance(folder, llama)
    assert distances[8] < distances[4] < distances[3]


def test_pruned_channels_are_gathered(tmp_path: Path, llama: Path, text: Path) -> None:
    options = SMALL.model_copy(update={"reconstruction": "prune", "alpha": 1.0})
    folder = quantize(llama, tmp_path / "out", [text], options, progress=False)
    linears, reader = contract(folder).block_linears(0), Reader(folder)
    assert linears["self_attn.q_proj"].columns == 64 and linears["mlp.down_proj"].columns is None
    index = reader.read("model.layers.0.self_attn.q_proj.input_index")
    assert torch.equal(index, reader.read("model.layers.0.self_attn.v_proj.input_index"))
    assert len(index.unique()) < 64


def test_padding_without_room_is_refused(tmp_path: Path, llama: Path, text: Path) -> None:
    options = SMALL.model_copy(update={"reconstruction": "pad"})
    with pytest.raises(ValueError, match=r"64 channels and 12\.5% more .* --max-extra-channels"):
        quantize(llama, tmp_path / "out", [text], options, progress=False)
    assert not (tmp_path / "out").exists()

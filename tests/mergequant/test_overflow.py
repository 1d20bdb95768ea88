"""Models that overflow, quantized end to end: one clear sentence, and nothing half-written."""

from pathlib import Path

import pytest
import torch

from mergequant import InputError, quantize
from tests.conftest import SMALL
from tests.mergequant.edited_models import WHOLE, Edit, Weights, edited


def fill(value: float, *names: str) -> Edit:
    def edit(x: Weights) -> None:
        for name in names:
            x[f"model.layers.1.{name}"].fill_(value)

    return edit


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj")
MIDDLE = ("mlp.gate_proj", "mlp.up_proj")
OVERFLOWS: dict[str, tuple[Edit, str]] = {
    "infinity less infinity in the scores": (
        fill(1e30, *(f"{name}.bias" for name in ATTENTION)),
        "The input of model.layers.1.self_attn.o_proj holds NaN or infinity",
    ),
    "infinity between gate and down": (
        fill(1e25, *(f"{name}.bias" for name in MIDDLE)),
        "The input of model.layers.1.mlp.down_proj holds NaN or infinity",
    ),
    "infinity behind the last block": (
        fill(3e38, "self_attn.o_proj.bias", "mlp.down_proj.bias"),
        "The output of model.layers.1 holds NaN or infinity",
    ),
    "huge queries and keys": (
        fill(1e25, *(f"{name}.weight" for name in ATTENTION)),
        "The weight of model.layers.1.self_attn.q_proj",
    ),
    "huge gates": (
        fill(1e25, *(f"{name}.weight" for name in MIDDLE)),
        "The weight of model.layers.1.mlp.gate_proj",
    ),
    "huge down": (fill(3e38, "mlp.down_proj.weight"), "The weight of model.layers.1.mlp.down_proj"),
}


def assert_one_sentence(message: str, thing: str, remedy: str) -> None:
    assert message.startswith(thing) and remedy in message
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_a_model_that_overflows_is_refused_and_leaves_nothing(
    tmp_path: Path, text: Path, overflow: str
) -> None:
    """In the second block, when the first is written already."""
    edit, expected = OVERFLOWS[overflow]
    biases = {"attention_bias": True, "mlp_bias": True}
    source = edited(tmp_path / "model", edit, blocks=2, **biases)
    with pytest.raises(InputError) as refusal:
        quantize(source, tmp_path / "new" / "out", [text], SMALL, progress=False)
    assert_one_sentence(str(refusal.value), expected, "check that")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_pilot_refuses_a_model_that_overflows(tmp_path: Path, text: Path) -> None:
    edit, _ = OVERFLOWS["infinity less infinity in the scores"]
    source = edited(tmp_path / "model", edit, blocks=2, attention_bias=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError) as refusal:
        quantize(source, tmp_path / "out", [text], WHOLE, progress=False)
    expected = "The input of model.layers.1.mlp.gate_proj holds NaN or infinity"
    assert_one_sentence(str(refusal.value), expected, "check that")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_rotation_that_overflows_16_bits_is_refused(tmp_path: Path, text: Path) -> None:
    """Of a token that the text does not hold."""
    source = edited(
        tmp_path / "model",
        lambda x: x["model.embed_tokens.weight"][255].fill_(3e4),
        dtype=torch.float16,
    )
    options = SMALL.model_copy(update={"rotation": "offline"})
    with pytest.raises(InputError) as refusal:
        quantize(source, tmp_path / "out", [text], options, progress=False)
    assert_one_sentence(
        str(refusal.value), "Tensor 'model.embed_tokens.weight' of", "choose rotation 'none'"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

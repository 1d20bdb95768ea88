"""Hostile models and texts, quantized end to end, give a good result; see also test_overflow.py."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from mergequant import quantize
from mergequant.calibration import statistics
from mergequant.evaluate.perplexity import reference_logits
from mergequant.evaluate.reference_forward import load_model
from mergequant.model.reader import Reader
from tests import outliers
from tests.conftest import SMALL
from tests.mergequant.edited_models import WHOLE, Edit, Weights, edited
from tests.tiny import make_model

FIRST = "model.layers.0."
NORMS = {"input_layernorm": "qkv", "post_attention_layernorm": ("gate", "up")}
# None of these models has a source of error that the plain one has not; another model is another
# draw of a few thousand roundings, and a lost norm, linear or rotation gives 1 or more.
ROOM = 2.0
CEILING = 0.05


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of one block that is nobody's enemy."""
    return make_model(tmp_path_factory.mktemp("plain") / "model", blocks=1)


@pytest.fixture(scope="module")
def bound(tmp_path_factory: pytest.TempPathFactory, plain: Path, text: Path) -> float:
    """Most error that counts as good."""
    output = quantize(
        plain, tmp_path_factory.mktemp("bound") / "out", [text], SMALL, progress=False
    )
    error = good_error(plain, output, text)
    # 0.035 of this random model in 4 bits: were everything wrong, all would be compared with that.
    assert error < CEILING
    return ROOM * error


def good_error(source: Path, output: Path, text: Path) -> float:
    """Relative squared error of the logits on the text's first tokens; all must be finite."""
    stored = Reader(output)
    for name in stored.headers:
        assert bool(torch.isfinite(stored.read(name).to(torch.float64)).all()), name
    ids = AutoTokenizer.from_pretrained(str(source))(text.read_text()[:100])["input_ids"]
    window = torch.tensor(ids)[None]
    exact, ours = (
        reference_logits(load_model(folder), window).to(torch.float64)
        for folder in (source, output)
    )
    assert bool(torch.isfinite(ours).all())
    centred = exact - exact.mean(dim=-1, keepdim=True)
    return float((ours - exact).square().sum() / centred.square().sum())


def report_of(output: Path) -> list[dict[str, Any]]:
    """Lines of the report; NaN and infinity are no JSON."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(constant)

    lines = (output / "quantization_report.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def assert_same(one: Path, other: Path) -> None:
    a, b = Reader(one), Reader(other)
    assert a.headers == b.headers
    for name in a.headers:
        assert torch.equal(a.read(name), b.read(name)), name


def pad_heads(x: Weights) -> None:
    x[f"{FIRST}self_attn.q_proj.weight"][32:] = 0
    x[f"{FIRST}self_attn.k_proj.weight"][8:16] = 0


def silence_values(x: Weights) -> None:
    x[f"{FIRST}self_attn.v_proj.weight"][3:9] = 0


def silence_norms(x: Weights) -> None:
    for number, norm in enumerate(NORMS):
        x[f"{FIRST}{norm}.weight"][[5, 7 + number]] = 0


def silence_residual(x: Weights) -> None:
    x["model.embed_tokens.weight"][:, 9] = 0
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        x[f"{FIRST}{name}.weight"][9] = 0


def repeat_channels(x: Weights) -> None:
    x["model.embed_tokens.weight"][:, [4, 40]] = x["model.embed_tokens.weight"][:, [3, 20]]
    for name in ("self_attn.o_proj", "mlp.down_proj", *NORMS):
        x[f"{FIRST}{name}.weight"][[4, 40]] = x[f"{FIRST}{name}.weight"][[3, 20]]
    x[f"{FIRST}self_attn.v_proj.weight"][1] = x[f"{FIRST}self_attn.v_proj.weight"][0]


def zero(name: str) -> Edit:
    return lambda x: x[f"{FIRST}{name}.weight"].zero_()


EDITS: dict[str, Edit] = {
    "padded heads": pad_heads,
    "values that never fire": silence_values,
    "norm channels of gain 0": silence_norms,
    "a residual channel of zeros": silence_residual,
    "repeated channels": repeat_channels,
}
ZEROS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")


@pytest.mark.parametrize("edit", [*EDITS.values(), *map(zero, ZEROS)], ids=[*EDITS, *ZEROS])
def test_zeros_and_repeats_are_quantized(
    tmp_path: Path, text: Path, bound: float, edit: Edit
) -> None:
    source = edited(tmp_path / "model", edit)
    output = quantize(source, tmp_path / "out", [text], SMALL, progress=False)
    assert good_error(source, output, text) < bound
    report = report_of(output)
    assert all(line["damping"] == SMALL.damping for line in report)
    assert all(0 <= line["loss_gptq"] < 0.1 for line in report)


@pytest.mark.parametrize(
    ("rotation", "dtype"),
    [("none", torch.float16), ("offline", torch.bfloat16), ("online", torch.float16)],
)
def test_the_whole_method_takes_all_of_them_at_once(
    tmp_path: Path, text: Path, bound: float, rotation: str, dtype: torch.dtype
) -> None:
    source = edited(tmp_path / "model", lambda x: [edit(x) for edit in EDITS.values()])
    options = WHOLE.model_copy(update={"rotation": rotation})
    output = quantize(source, tmp_path / "out", [text], options, progress=False)
    assert good_error(source, output, text) < bound
    attention = load_model(output).model.layers[0].self_attn
    assert not attention.q_proj.weight[32:].any() and attention.q_proj.weight[:32].any()
    assert not attention.k_proj.weight[8:16].any() and attention.k_proj.weight[:8].any()
    (trained,) = [line["compensation"] for line in report_of(output) if "compensation" in line]
    assert trained["kept"] == (trained["loss_after"] < trained["loss_before"])


@pytest.mark.parametrize("rotation", ["none", "online"])
def test_a_block_that_adds_nothing_still_adds_nothing(
    tmp_path: Path, text: Path, rotation: str
) -> None:
    """Norms of gain 0 and linears of zeros; what errors there are is a rotation's in float32.

    The head stays as it is: its rounding would hide them.
    """

    def silence(x: Weights) -> None:
        for name in x:
            if "input_layernorm" in name or "mlp" in name:
                x[name].zero_()

    source = edited(tmp_path / "model", silence)
    options = WHOLE.model_copy(update={"rotation": rotation, "head_bits": 16})
    output = quantize(source, tmp_path / "out", [text], options, progress=False)
    assert good_error(source, output, text) <= (0 if rotation == "none" else (64 * 2**-24) ** 2)
    report = report_of(output)
    assert all(line["loss_gptq"] == 0 for line in report)
    assert report[0]["compensation"]["kept"] is False


def test_a_channel_of_gain_0_has_no_unit_to_spoil_the_others_weight_steps(
    tmp_path: Path, text: Path
) -> None:
    """Gains may be small and weights as much larger: that is the same model."""

    def shrink(x: Weights) -> None:
        silence_norms(x)
        for norm, readers in NORMS.items():
            x[f"{FIRST}{norm}.weight"] *= 2**-10
            folder = "self_attn" if norm == "input_layernorm" else "mlp"
            for reader in readers:
                x[f"{FIRST}{folder}.{reader}_proj.weight"] *= 2**10

    for name, edit in (("plain", silence_norms), ("small", shrink)):
        source = edited(tmp_path / name / "model", edit)
        quantize(source, tmp_path / name / "out", [text], SMALL, progress=False)
    assert_same(tmp_path / "plain" / "out", tmp_path / "small" / "out")


def test_outliers_that_the_weights_undo_change_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plain: Path, text: Path
) -> None:
    """A channel in each norm is 2^14 times as large: a step of its own swallows that whole."""
    monkeypatch.setattr(outliers, "FACTORS", (2.0**14, 2.0**14))
    spiked = outliers.with_outliers(plain, tmp_path / "spiked")
    for name, source in (("a", plain), ("b", spiked)):
        quantize(source, tmp_path / name, [text], WHOLE, progress=False)
    assert_same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(("mode", "alpha"), [("none", 0.0), ("prune", 5.0), ("pad", 5.0)])
def test_outliers_are_split_pruned_for_or_left(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    plain: Path,
    text: Path,
    bound: float,
    mode: str,
    alpha: float,
) -> None:
    monkeypatch.setattr(outliers, "FACTORS", (1e4, 1e4))
    spiked = outliers.with_outliers(plain, tmp_path / "spiked")
    changes = {"reconstruction": mode, "alpha": alpha, "max_extra_channels": 0.25}
    options = SMALL.model_copy(update=changes)
    output = quantize(spiked, tmp_path / "out", [text], options, progress=False)
    assert good_error(spiked, output, text) < bound
    for line in report_of(output):
        if line["activations"] == "static" and mode != "none":
            assert line["reconstruction"]["strong"] == 1
            assert line["reconstruction"]["dropped"] == (1 if mode == "prune" else 0)


@pytest.mark.parametrize(("windows", "epochs"), [(1, 0), (3, 2)])
def test_little_text_is_enough_and_said_in_the_log(
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    plain: Path,
    text: Path,
    bound: float,
    windows: int,
    epochs: int,
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[: 70 * windows])
    output = quantize(plain, tmp_path / "out", [short], WHOLE, progress=False)
    assert good_error(plain, output, text) < bound
    assert f"{windows} calibration windows instead of 8" in caplog.text
    assert ("One calibration window cannot be held out" in caplog.text) == (windows == 1)
    assert report_of(output)[0]["compensation"]["epochs"] == epochs


def test_one_character_over_and_over_is_a_text(tmp_path: Path, plain: Path, bound: float) -> None:
    same = tmp_path / "same.txt"
    same.write_text("a" * 2000)
    output = quantize(plain, tmp_path / "out", [same], WHOLE, progress=False)
    assert good_error(plain, output, same) < bound


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Correlate the two liveliest channels of each Hessian by more than 1, the given number."""
    exact = statistics.Moments.hessian

    def patch(correlation: float) -> None:
        def get(self: statistics.Moments) -> Tensor:
            hessian = exact(self)
            i, j = hessian.diagonal().topk(2).indices.tolist()
            both = math.sqrt(float(hessian[i, i] * hessian[j, j]))
            hessian[i, j] = hessian[j, i] = correlation * both
            return hessian

        monkeypatch.setattr(statistics.Moments, "hessian", get)

    return patch


def test_an_almost_positive_definite_hessian_is_damped_more(
    tmp_path: Path, plain: Path, text: Path, bound: float, spoil: Callable[[float], None]
) -> None:
    spoil(1.05)
    output = quantize(plain, tmp_path / "out", [text], SMALL, progress=False)
    assert good_error(plain, output, text) < bound
    for line in report_of(output):
        doublings = math.log2(line["damping"] / SMALL.damping)
        assert doublings >= 1 and doublings == round(doublings)
        assert line["loss_gptq"] is not None


def test_a_hessian_beyond_damping_means_rounding_to_nearest(
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    plain: Path,
    text: Path,
    spoil: Callable[[float], None],
) -> None:
    nearest = SMALL.model_copy(update={"weights": "rtn"})
    quantize(plain, tmp_path / "nearest", [text], nearest, progress=False)
    spoil(1e6)
    same_weights = SMALL.model_copy(update={"input_correction": False})
    output = quantize(plain, tmp_path / "out", [text], same_weights, progress=False)
    assert_same(output, tmp_path / "nearest")
    assert all(x["damping"] is None and x["loss_gptq"] is None for x in report_of(output))
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert f"{FIRST}{name} and its neighbours are rounded to nearest: no" in caplog.text


def test_the_rest_of_the_method_goes_on_without_gptq(
    tmp_path: Path, plain: Path, text: Path, bound: float, spoil: Callable[[float], None]
) -> None:
    spoil(1e6)
    output = quantize(plain, tmp_path / "out", [text], WHOLE, progress=False)
    assert good_error(plain, output, text) < bound
    report = report_of(output)
    assert all(x["damping"] is None and x["loss_gptq"] is None for x in report)
    assert report[0]["compensation"]["epochs"] == 2

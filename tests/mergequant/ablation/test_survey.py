"""The survey of a 16-bit model, against the whole model run at once."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergequant import Options
from mergequant.ablation import survey as module
from mergequant.ablation.survey import Survey, kept_survey, survey
from mergequant.evaluate.reference_forward import load_model
from mergequant.model.architectures import find
from mergequant.model.reader import Reader
from tests.tiny import make_model

OPTIONS = Options(statistics_samples=3, sequence_length=32, device="cpu", alpha=2.0)
HUGE = 5


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Reader:
    """`llama` with a huge channel behind one norm."""
    folder = tmp_path_factory.mktemp("outlier") / "llama"
    shutil.copytree(llama, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][HUGE] *= 30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Reader(folder)


def surveyed_with(reader: Reader, text: Path, options: Options) -> Survey:
    made = survey(reader, find("llama"), [text], options, progress=False)
    assert made is not None
    return made


@pytest.fixture(scope="module")
def surveyed(reader: Reader, text: Path) -> Survey:
    return surveyed_with(reader, text, OPTIONS)


def test_largest_values_are_those_of_the_whole_model(
    reader: Reader, text: Path, surveyed: Survey
) -> None:
    model: Any = load_model(reader.folder)
    largest: dict[str, list[Tensor]] = {"attn_in": [], "mlp_in": []}

    def keep(space: str) -> Any:
        return lambda _, inputs: largest[space].append(inputs[0].abs().amax(dim=(0, 1)))

    for block in model.model.layers:
        block.self_attn.q_proj.register_forward_pre_hook(keep("attn_in"))
        block.mlp.gate_proj.register_forward_pre_hook(keep("mlp_in"))
    with torch.no_grad():
        model(module._windows(reader, [text], OPTIONS))
    assert set(surveyed.largest) == set(largest)
    for space, values in largest.items():
        # Two float32 forwards of 2 blocks, batched otherwise.
        torch.testing.assert_close(
            surveyed.largest[space], torch.stack(values), rtol=1e-4, atol=1e-5
        )


def test_columns_are_those_of_the_space_with_the_strongest_channel(surveyed: Survey) -> None:
    assert (surveyed.space, surveyed.block) == ("mlp_in", 1)
    assert int(surveyed.largest["mlp_in"][1].argmax()) == int(surveyed.before.argmax()) == HUGE


def test_reconstruction_spreads_the_largest_column_and_loses_nothing(surveyed: Survey) -> None:
    assert len(surveyed.after) > len(surveyed.before) == 64
    assert float(surveyed.after.max()) < 0.5 * float(surveyed.before.max())
    # Shares of a channel add up to 1, so the columns' magnitudes do, each rounded to float32.
    before, after = (x.to(torch.float64).sum() for x in (surveyed.before, surveyed.after))
    assert abs(float(after / before) - 1) <= 2.0**-23


def test_pruning_leaves_as_many_columns(reader: Reader, text: Path) -> None:
    options = OPTIONS.model_copy(update={"reconstruction": "prune"})
    assert len(surveyed_with(reader, text, options).after) == 64


def test_there_is_no_survey_where_nothing_reads_a_norm(tmp_path: Path, text: Path) -> None:
    olmo = Reader(make_model(tmp_path / "olmo2", "olmo2"))
    file = tmp_path / "survey.safetensors"
    assert kept_survey(file, olmo, find("olmo2"), [text], OPTIONS, progress=False) is None


def test_a_survey_is_kept_for_the_same_options(
    reader: Reader, text: Path, tmp_path: Path, surveyed: Survey, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(options: Options) -> Survey:
        file = tmp_path / "survey.safetensors"
        made = kept_survey(file, reader, find("llama"), [text], options, progress=False)
        assert made is not None
        return made

    first = again(OPTIONS)
    monkeypatch.setattr(module, "survey", lambda *_: pytest.fail("it is there already"))
    kept = again(OPTIONS)
    for made in (first, surveyed):
        assert (kept.space, kept.block) == (made.space, made.block)
    assert torch.equal(kept.before, first.before) and torch.equal(kept.after, first.after)
    assert all(torch.equal(kept.largest[x], first.largest[x]) for x in first.largest)
    with pytest.raises(pytest.fail.Exception):
        again(OPTIONS.model_copy(update={"seed": 1}))

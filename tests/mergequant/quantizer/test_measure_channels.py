"""What is measured of channels: which are alike, as norms hand them on, and what equalizes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergequant import InputError, Options, quantize
from mergequant.methods import rotate
from mergequant.model.channels import Channels
from mergequant.model.decoder import Decoder
from mergequant.model.reader import Reader
from mergequant.output.writer import Writer
from mergequant.quantizer.decide import decide
from mergequant.quantizer.measure_channels import variance_shares
from mergequant.quantizer.pilot_walk import walk_plain_model
from mergequant.quantizer.prepare import calibration_of, open_model
from tests.conftest import SMALL
from tests.tiny import make_model

CPU = torch.device("cpu")
ROTATED = SMALL.model_copy(update={"rotation": "offline"})


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotate, "_SMALLEST_GROUP", 16)  # 4 groups of 64 channels


def order_of(model: Path, text: Path, **changes: object) -> list[int] | None:
    options = ROTATED.model_copy(update=changes)
    windows = calibration_of(Reader(model), [text], options)
    order = walk_plain_model(model, windows, options, CPU, False).channels.order
    return None if order is None else order.tolist()


def test_shares_are_of_tokens_divided_by_their_size() -> None:
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)) + 3.0
    x *= torch.logspace(-1, 1, 8)
    lengths = torch.logspace(-3, 3, 400)[:, None]  # of tokens: a norm divides them out
    rows = [row / (sum(float(v) ** 2 for v in row) / 8) ** 0.5 for row in x]
    variance = torch.stack(rows).double().var(dim=0, unbiased=False)
    shares = variance_shares(list(torch.split((x * lengths)[None], 100, dim=1)))
    torch.testing.assert_close(shares, variance / variance.sum(), rtol=1e-5, atol=0)
    assert torch.equal(variance_shares([torch.zeros(1, 3, 8)]), torch.zeros(8).double())


def test_channels_come_by_falling_variance(tmp_path: Path, text: Path) -> None:
    model = make_model(tmp_path / "model", "llama", blocks=1)
    large = [5, 40, 17]
    reader = Reader(model)
    (file,) = reader.weight_files()
    tensors = load_file(file)
    for place, channel in enumerate(large):
        tensors["model.embed_tokens.weight"][:, channel] *= 1000.0 / 10**place
    save_file(tensors, file, {"format": "pt"})
    order = order_of(model, text)
    assert order is not None and sorted(order) == list(range(64)) and order[:3] == large


@pytest.mark.parametrize(
    "changes", [{"rotation": "none"}, {"residual_rotation": "full"}, {"activations": "dynamic"}]
)
def test_there_is_no_order_where_nothing_is_graded(
    llama: Path, text: Path, changes: dict[str, object]
) -> None:
    assert order_of(llama, text) is not None
    assert order_of(llama, text, **changes) is None


def test_a_model_of_one_group_has_no_order(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotate, "_SMALLEST_GROUP", 64)
    assert order_of(llama, text) is None


def test_what_is_decided_is_what_the_checkpoint_is_rotated_by(
    tmp_path: Path, llama: Path, text: Path
) -> None:
    folder = quantize(llama, tmp_path / "out", [text], ROTATED, progress=False)
    windows = calibration_of(Reader(llama), [text], ROTATED)
    _, channels = decide(llama, windows, ROTATED, CPU, False)
    assert channels.order is not None
    name = "model.embed_tokens.weight"
    graded, _, _ = open_model(llama, ROTATED, channels)
    full, _, _ = open_model(llama, ROTATED)
    stored = Reader(folder).read(name)
    assert torch.equal(stored, graded.read_in_source_dtype(name))
    assert not torch.equal(stored, full.read_in_source_dtype(name))
    options = json.loads((folder / "config.json").read_text())["quantization_config"]
    told = Options.model_validate(options["provenance"]["options"])
    assert told.residual_rotation == "graded"


def test_scales_are_of_the_inputs_of_o_and_down(llama: Path, text: Path) -> None:
    windows = calibration_of(Reader(llama), [text], ROTATED)
    scales = walk_plain_model(llama, windows, ROTATED, CPU, False).channels.scales
    reader, architecture, _ = open_model(llama, SMALL)
    decoder = Decoder(reader, architecture, CPU)
    used = windows[: SMALL.statistics_samples]
    (hidden,) = decoder.embed(used, len(used), len(used)).batches
    with decoder.block(0) as block:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            inputs: list[Tensor] = []
            block.observe(name, [hidden], inputs.append)
            x, weight = inputs[0].double(), block.weight(name).double()
            energy = (x.square() / x.square().sum(1, keepdim=True)).sum(0)
            columns = weight.square().sum(0)
            if name == "self_attn.o_proj":  # two query heads of 32 channels share a value
                energy = energy.reshape(2, 32).mean(0).repeat(2)
                columns = columns.reshape(2, 32).mean(0).repeat(2)
            ratio = scales[f"model.layers.0.{name}"].double() / (energy / columns) ** 0.25
            torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-5, atol=0)


def test_a_linear_that_is_ignored_is_not_scaled(llama: Path, text: Path) -> None:
    options = ROTATED.model_copy(update={"ignore": ("re:.*down_proj",)})
    windows = calibration_of(Reader(llama), [text], options)
    scales = walk_plain_model(llama, windows, options, CPU, False).channels.scales
    assert scales and not any("down" in name for name in scales)
    off = options.model_copy(update={"equalization": False})
    assert not walk_plain_model(llama, windows, off, CPU, False).channels.scales


def interrupted(output: Path, model: Path, text: Path) -> None:
    """Leave an unfinished run, with one block finished."""
    write = Writer.write_block

    def stop(writer: Writer, number: int, *rest: Any) -> None:
        write(writer, number, *rest)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "write_block", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, output, [text], ROTATED, progress=False)


def test_a_run_that_continues_has_the_same_channels(
    tmp_path: Path, llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize(llama, tmp_path / "whole", [text], ROTATED, progress=False)
    interrupted(tmp_path / "cut", llama, text)
    monkeypatch.setattr("mergequant.quantizer.decide.walk_plain_model", None)  # not again
    cut = quantize(llama, tmp_path / "cut", [text], ROTATED, progress=False)
    for file in sorted(whole.glob("*.safetensors")):
        assert file.read_bytes() == (cut / file.name).read_bytes()


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"damaged")])
def test_a_run_whose_channels_are_lost_is_not_continued(
    tmp_path: Path, llama: Path, text: Path, damage: Callable[[Path], object]
) -> None:
    interrupted(tmp_path / "cut", llama, text)
    damage(tmp_path / "cut" / ".partial" / "pilot.safetensors")
    with pytest.raises(InputError, match=r"pilot.safetensors is missing or damaged: remove"):
        quantize(llama, tmp_path / "cut", [text], ROTATED, progress=False)


def test_what_is_scaled_is_what_the_checkpoint_holds(
    tmp_path: Path, llama: Path, text: Path
) -> None:
    """Of linears that stay in 16 bits the checkpoint holds the weights themselves."""
    options = ROTATED.model_copy(update={"ignore": ("re:.*(q|k|v|gate|up)_proj",)})
    folder = quantize(llama, tmp_path / "out", [text], options, progress=False)
    windows = calibration_of(Reader(llama), [text], options)
    _, channels = decide(llama, windows, options, CPU, False)
    scaled, _, _ = open_model(llama, options, channels)
    unscaled, _, _ = open_model(llama, options, Channels(channels.order))
    for name in ("self_attn.v_proj.weight", "mlp.up_proj.weight"):
        stored = Reader(folder).read(f"model.layers.0.{name}")
        for reader, same in ((scaled, True), (unscaled, False)):
            weight = reader.read(f"model.layers.0.{name}").to(stored.dtype)
            assert torch.equal(stored, weight) == same

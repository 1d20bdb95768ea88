"""Bits by sensitivity: the gradients are the model's, and the budget reaches the checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mergequant import InputError, Options, quantize
from mergequant.methods.sensitivity import average_bits
from mergequant.model.decoder import Decoder
from mergequant.quantizer.choose_bits import measure, resolve_bits
from mergequant.quantizer.prepare import calibration_of, open_folder, open_model
from mergequant.quantizer.resolve import make_plan
from mergequant_vllm.format import parse
from tests.conftest import SMALL
from tests.tiny import make_model

CPU = torch.device("cpu")


def options(**changes: Any) -> Options:
    return Options.model_validate({**SMALL.model_dump(), "alpha": 0.0, **changes})


def decoder_of(model: Path, of: Options) -> Decoder:
    reader, architecture, _ = open_model(model, of)
    return Decoder(reader, architecture, CPU)


@pytest.mark.parametrize("model_type", ["llama", "granite"])
def test_gradients_carried_back_block_by_block_are_the_models(
    tmp_path: Path, text: Path, model_type: str
) -> None:
    model_folder = make_model(tmp_path / "model", model_type)
    windows = calibration_of(open_folder(model_folder)[0], [text], options())[:2]
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    names = [f"model.layers.{n}.{x}" for n in (0, 1) for x in ("self_attn.q_proj", "mlp.down_proj")]
    for name in names:

        def keep(_: Any, inputs: Any, output: torch.Tensor, name: str = name) -> None:
            inputs[0].retain_grad()
            seen[name] = inputs[0]

        model.get_submodule(name).register_forward_hook(keep)
    logits = model(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten(), reduction="sum")
    loss.backward()

    decoder = decoder_of(model_folder, options())
    hidden = [decoder.embed(windows, 2, 2).batches[0]]
    for number in (0, 1):
        with decoder.block(number) as block:
            hidden.append(block.forward(hidden[-1]))
    gradient = decoder.loss_gradient(hidden[2], windows)
    for number in (1, 0):
        with decoder.block(number) as block:
            inside = ["self_attn.q_proj", "mlp.down_proj"]
            gradient, found = block.backward(hidden[number], gradient, inside)
        for name, linear in found.items():
            expected = seen[f"model.layers.{number}.{name}"].grad
            assert expected is not None
            # The same float32 operations, but for the head's, which takes a window at a time.
            torch.testing.assert_close(
                linear.by_input, expected.flatten(0, 1), rtol=1e-3, atol=1e-5
            )


def test_the_budget_is_what_the_checkpoint_has(tmp_path: Path, llama: Path, text: Path) -> None:
    asked = options(average_bits=5.0, overrides={"re:.*0.self_attn.o_proj": {"weight_bits": 3}})
    folder = quantize(llama, tmp_path / "out", [text], asked, progress=False)
    stored = parse(json.loads((folder / "config.json").read_text())["quantization_config"])
    linears = {name: x for name, x in stored.quantized.items() if "layers" in name}
    weights = {name: x.shape[0] * x.shape[1] for name, x in linears.items()}
    bits = sum((x.weight.bits + x.input.bits) / 2 * weights[name] for name, x in linears.items())
    assert 4 < bits / sum(weights.values()) <= 5
    assert linears["model.layers.0.self_attn.o_proj"].weight.bits == 3  # what was asked for stays
    for number in (0, 1):
        for merged in (("q", "k", "v"), ("gate", "up")):
            owner = "self_attn" if "q" in merged else "mlp"
            parts = [linears[f"model.layers.{number}.{owner}.{x}_proj"] for x in merged]
            assert len({(x.weight.bits, x.input.bits) for x in parts}) == 1


def test_bits_are_spent_until_the_estimate_is_within_the_bound(llama: Path, text: Path) -> None:
    windows = calibration_of(open_folder(llama)[0], [text], options())
    decoder = decoder_of(llama, options())
    plan = make_plan(decoder.architecture, decoder.reader.config, options(), "")
    before = measure(decoder, plan, windows, False)
    damage = sum(x.damage for x in before)
    assert damage > 0 and average_bits(before) == 4
    assert resolve_bits(decoder, windows, options(within=2 * damage), False) == {}
    half = resolve_bits(decoder, windows, options(within=damage / 2), False)
    most = resolve_bits(decoder, windows, options(within=damage / 20), False)
    assert 0 < len(half) <= len(most)
    names = {name for x in before for name in x.linears}
    assert half.keys() <= names


@pytest.mark.parametrize("wrong", [{"average_bits": 9.0}, {"within": 0.0}])
def test_a_budget_that_means_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        options(**wrong)


def test_a_budget_that_is_spent_already_is_refused_before_any_work(
    tmp_path: Path, llama: Path, text: Path
) -> None:
    with pytest.raises(InputError, match=r"--average-bits 3.5 is less than the 4.00 bits .* more"):
        quantize(llama, tmp_path / "out", [text], options(average_bits=3.5), progress=False)
    assert not (tmp_path / "out").exists()

"""Recipes: named ones are options, flags count over them, and one lies beside the weights."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from mergequant import InputError, Options, cli
from mergequant.recipe import FILE, dump_recipe, load_recipe, recipe_names


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """Options that the command would have quantized with."""
    import mergequant.evaluate.checkpoint_contents as contents
    import mergequant.quantizer.run as run

    made: list[Options] = []
    monkeypatch.setattr(run, "quantize", lambda *words, **_: made.append(words[3]))
    monkeypatch.setattr(contents, "sizes", lambda *_: "small")
    return made


def command(*words: str) -> None:
    cli.app(["quantize", "m", "o", "--calibration", "t", *words], standalone_mode=False)


@pytest.mark.parametrize("name", recipe_names())
def test_a_named_recipe_is_what_its_name_says(name: str) -> None:
    options = Options.model_validate(load_recipe(name))
    weights, activations, static = re.fullmatch(r"w(\d)a(\d)(_static)?", name).groups()  # type: ignore[union-attr]
    assert options.weight_bits == int(weights)
    assert options.static_bits == options.dynamic_bits == int(activations)
    assert (options.activations == "fully_static") == bool(static)


def test_the_help_names_every_recipe() -> None:
    quantize: Any = typer.main.get_command(cli.app)
    parameters = quantize.commands["quantize"].params
    told = next(x.help for x in parameters if x.name == "recipe")
    assert set(recipe_names()) <= set(re.findall(r"\w+", told))


def test_flags_count_over_the_recipe(quantized: list[Options]) -> None:
    command("--recipe", "w8a8", "--static-bits", "4", "--fast")
    command("--recipe", "w8a8")
    command()
    first, second, third = quantized
    assert (first.weight_bits, first.static_bits, first.dynamic_bits) == (8, 4, 8)
    assert first.compensation_rank == 0
    assert second == Options(weight_bits=8, static_bits=8, dynamic_bits=8)
    assert third == Options()


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(alpha=2.0, ignore=["lm_head"], equalization=False),
        Options.model_validate({"overrides": {"re:.*down_proj": {"weight_bits": 8}}}),
    ],
)
def test_what_is_written_is_read_again(
    quantized: list[Options], tmp_path: Path, options: Options
) -> None:
    (tmp_path / FILE).write_text(dump_recipe(options))
    command("--recipe", str(tmp_path / FILE))
    assert quantized == [options]


def test_a_checkpoint_has_the_recipe_that_it_was_made_by(checkpoint: Path) -> None:
    from tests.conftest import SMALL

    made = Options.model_validate(load_recipe(str(checkpoint / FILE)))
    assert made.model_copy(update={"device": SMALL.device}) == SMALL


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("weight_bits: [", "is not YAML"),
        ("- 4", "needs lines such as"),
        ("weight-bits: 4", "'weight-bits', which is no option"),
        ("overrides: [a]", "overrides are options by pattern"),
        ("overrides: {x: 8}", "overrides are options by pattern"),
        ("weight_bits: 5", "--weight-bits is wrong"),
    ],
)
def test_a_bad_recipe_is_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(InputError, match=message):
        command("--recipe", str(tmp_path / "own.yaml"))


def test_an_unknown_name_says_which_there_are(quantized: list[Any]) -> None:
    with pytest.raises(InputError, match="neither a file nor one of w3a4, w4a4, w4a8, w8a8"):
        command("--recipe", "w2a2")
    assert not quantized

"""What `mergequant architectures` says."""

import json

import pytest
from typer.testing import CliRunner

from mergequant.cli import app
from mergequant.model.architectures import ARCHITECTURES
from mergequant.model.overview import overview


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["architectures", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_type_has_a_line() -> None:
    lines = overview(ARCHITECTURES).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(ARCHITECTURES)
    assert run() == overview(ARCHITECTURES) + "\n"


def test_each_linear_is_named_with_its_reason() -> None:
    said = run("gpt_neox")
    assert "attention.query_key_value: a static step per channel, in input_layernorm" in said
    assert "(one matrix: query, key, value, head by head)" in said
    assert "attention.dense: a step per token: attention stands between" in said
    assert "R2 and R4 alone, since the LayerNorm 'input_layernorm'" in said
    assert "it reads the residual itself" in run("olmo2")
    assert "the embedding, in 16 bits" in run("gemma2")
    assert "llama_4_scaling in config.json, for vLLM, made of rope_parameters." in run("ministral3")


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_programs_get_the_same(model_type: str) -> None:
    (record,) = json.loads(run(model_type, "--json")).values()
    table = ARCHITECTURES[model_type]
    assert list(record["linears"]) == [
        linear.name for readers in table.readers() for linear in readers.linears
    ]
    static = {x.norm is not None for x in table.readers()}
    assert {entry["static"] for entry in record["linears"].values()} == static

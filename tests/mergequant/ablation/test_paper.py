"""The paper's figures: transcribed whole, and found for the right model."""

from typing import Any

import pytest

from mergequant.ablation import paper

LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


@pytest.mark.parametrize(
    ("changed", "model"),
    [
        ({}, "Llama-2-7B"),
        ({"max_position_embeddings": 2048}, None),  # the first Llama
        ({"num_hidden_layers": 31}, None),
    ],
)
def test_a_model_is_known_by_its_shape(changed: dict[str, Any], model: str | None) -> None:
    assert paper.model_of({**LLAMA_2_7B, **changed}) == model


def test_a_table_shows_its_own_model_unless_the_paper_has_ours() -> None:
    assert paper.shown_model("table7", "Llama-3-70B") == "Llama-3-70B"
    assert paper.shown_model("table5", "Llama-3-70B") == "Llama-2-7B"
    assert paper.shown_model("table4", None) == "Llama-3-8B"
    assert paper.shown_model("figure1", None) is None


# Averages as the paper prints them: they catch a wrong digit among the accuracies.
@pytest.mark.parametrize(
    ("table", "model", "method", "average"),
    [
        ("table1", "Llama-2-7B", "FP16", 68.95),
        ("table1", "Llama-2-7B", "QuaRot", 64.92),
        ("table1", "Llama-2-7B", "QuaRot n-h", 50.78),
        ("table1", "Llama-2-7B", "MergeQuant", 66.20),
        ("table1", "Llama-2-13B", "FP16", 71.71),
        ("table1", "Llama-2-13B", "MergeQuant n-h", 60.17),
        ("table1", "Llama-2-13B", "QuaRot", 68.89),
        ("table1", "Llama-2-13B", "MergeQuant", 69.32),
        ("table1", "Llama-2-70B", "MergeQuant n-h", 66.58),
        ("table1", "Llama-2-70B", "QuaRot", 74.94),
        ("table1", "Llama-2-70B", "MergeQuant", 75.19),
        ("table1", "Llama-3-8B", "QuaRot", 66.41),
        ("table1", "Llama-3-8B", "MergeQuant", 68.51),
        ("table1", "Llama-3-70B", "FP16", 80.06),
        ("table1", "Llama-3-70B", "QuaRot", 70.20),
        ("table1", "Llama-3-70B", "MergeQuant", 70.59),
        ("table4", "Llama-3-8B", "FP16", 72.77),
        ("table4", "Llama-3-8B", "+ Lora fine-tuning", 68.51),
    ],
)
def test_averages_agree_with_the_printed_ones(
    table: str, model: str, method: str, average: float
) -> None:
    figures = paper.figures(table, model, method)
    assert figures is not None and figures.average is not None
    # Printed figures may be cut to 0.01, the five accuracies and their mean.
    assert abs(figures.average - average) <= 0.02

"""The paper's own figures, to be printed beside ours: MergeQuant (arXiv 2503.07654)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Order of the accuracies below, by the names that lm-eval gives the tasks.
TASKS = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande")


@dataclass(frozen=True)
class Figures:
    """One line of a table of the paper.

    Attributes:
        wikitext: perplexity on WikiText-2; c4: on C4.
        accuracies: percent, in the order of `TASKS`; empty where there are none.
        average: percent; the mean of the accuracies where they are given.
    """

    wikitext: float | None = None
    c4: float | None = None
    accuracies: tuple[float, ...] = ()
    average: float | None = None


def _line(wikitext: float, c4: float | None, *accuracies: float) -> Figures:
    mean = sum(accuracies) / len(accuracies) if accuracies else None
    return Figures(wikitext, c4, accuracies, mean)


_FP16 = {
    "Llama-2-7B": _line(5.47, 7.26, 79.05, 74.54, 46.16, 75.98, 69.06),
    "Llama-2-13B": _line(4.88, 6.47, 80.47, 77.44, 49.15, 79.39, 72.14),
    "Llama-2-70B": _line(3.32, 5.71, 82.70, 81.02, 57.17, 83.81, 77.98),
    "Llama-3-8B": _line(6.14, 9.45, 80.74, 77.57, 53.50, 79.12, 72.93),
    "Llama-3-70B": _line(2.86, 7.17, 84.44, 85.94, 64.25, 84.93, 80.74),
}

_TABLE1: Mapping[str, Mapping[str, Figures]] = {
    "Llama-2-7B": {
        "SmoothQuant": _line(254.5, None, 54.12, 31.42, 24.83, 29.15, 50.00),
        "QuaRot n-h": _line(16.43, None, 66.38, 48.32, 31.74, 54.89, 52.64),
        "MergeQuant n-h": _line(8.39, 10.87, 71.33, 60.31, 34.22, 63.21, 58.88),
        "QuaRot": _line(6.10, 8.32, 76.33, 68.35, 42.32, 72.53, 65.11),
        "MergeQuant": _line(6.09, 7.87, 76.71, 70.83, 44.11, 72.74, 66.61),
    },
    "Llama-2-13B": {
        "SmoothQuant": _line(254.53, None, 62.47, 45.22, 27.13, 44.33, 50.78),
        "QuaRot n-h": _line(15.77, None, 67.79, 53.49, 35.41, 61.53, 55.17),
        "MergeQuant n-h": _line(7.36, 9.50, 73.34, 63.55, 37.63, 66.51, 59.83),
        "QuaRot": _line(5.40, 7.54, 79.05, 73.27, 45.48, 76.03, 70.64),
        "MergeQuant": _line(5.29, 6.98, 78.62, 74.24, 47.27, 76.47, 70.01),
    },
    "Llama-2-70B": {
        "SmoothQuant": _line(57.10, None, 66.57, 69.53, 31.73, 45.14, 39.42),
        "QuaRot n-h": _line(12.47, None, 66.79, 52.49, 34.41, 60.53, 54.17),
        "MergeQuant n-h": _line(5.36, 7.50, 76.34, 71.55, 46.63, 73.51, 64.83),
        "QuaRot": _line(3.79, 6.12, 81.83, 79.76, 55.46, 81.58, 76.09),
        "MergeQuant": _line(3.78, 5.89, 81.67, 79.89, 55.51, 81.91, 76.93),
    },
    "Llama-3-8B": {
        "QuaRot": _line(8.16, 13.38, 75.35, 70.83, 45.73, 72.97, 67.17),
        "MergeQuant": _line(7.92, 11.71, 77.96, 73.70, 46.38, 74.93, 69.58),
    },
    "Llama-3-70B": {
        "QuaRot": _line(6.60, 12.87, 78.89, 74.37, 49.49, 77.22, 71.03),
        "MergeQuant": _line(6.86, 10.52, 79.82, 73.11, 50.00, 77.71, 72.35),
    },
}

_TABLE4: Mapping[str, Mapping[str, Figures]] = {
    "Llama-3-8B": {
        "QuaRot & Static": _line(18.23, 23.56, 62.02, 47.05, 28.67, 50.03, 57.22),
        "+ QSM": _line(10.61, 15.42, 72.03, 61.41, 37.88, 67.47, 65.67),
        "+ Clipping": _line(9.20, 13.40, 74.70, 65.45, 40.53, 70.99, 69.61),
        "+ Lora fine-tuning": _line(7.92, 11.71, 77.96, 73.70, 46.38, 74.93, 69.58),
    },
}

_TABLE5: Mapping[str, Mapping[str, Figures]] = {
    "Llama-2-7B": {
        "QuaRot-w3-asym": Figures(7.16, 9.34, average=61.24),
        "QuaRot-w3-group": Figures(7.04, 9.17, average=62.08),
        "MergeQuant-w3-asym": Figures(6.62, 8.91, average=63.37),
        "MergeQuant-w3-group": Figures(6.37, 8.51, average=64.58),
    },
}

_CLIPPING = {
    "Llama-2-7B": ((7.32, 8.96), (6.91, 8.58), (6.46, 8.19)),
    "Llama-2-13B": ((5.78, 7.48), (5.35, 7.03), (5.30, 6.98)),
    "Llama-2-70B": ((4.23, 6.64), (3.96, 6.14), (3.89, 6.06)),
    "Llama-3-8B": ((9.64, 13.45), (8.77, 12.68), (7.96, 11.61)),
    "Llama-3-70B": ((11.34, 14.03), (9.01, 11.97), (7.12, 10.73)),
}
_TABLE7: Mapping[str, Mapping[str, Figures]] = {
    model: {
        kind: _line(*perplexities)
        for kind, perplexities in zip(
            ("No-clipping", "Channel-clipping", "Adaptive clipping"), rows, strict=True
        )
    }
    for model, rows in _CLIPPING.items()
}

# Table 8: calibration in minutes, fine-tuning in hours.
TABLE8 = {
    "Llama-2-7B": (5.3, 1.6),
    "Llama-2-13B": (9.2, 2.8),
    "Llama-2-70B": (43.1, 9.3),
    "Llama-3-8B": (5.9, 1.7),
    "Llama-3-70B": (44.5, 9.3),
}

# Figures of each table, and the model that it is shown for if ours is none of the paper's.
_TABLES = {
    "table1": (_TABLE1, "Llama-2-7B"),
    "table4": (_TABLE4, "Llama-3-8B"),
    "table5": (_TABLE5, "Llama-2-7B"),
    "table7": (_TABLE7, "Llama-2-7B"),
}

_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
)
_SHAPES: Mapping[tuple[Any, ...], str] = {
    (4096, 11008, 32, 32000, 4096): "Llama-2-7B",
    (5120, 13824, 40, 32000, 4096): "Llama-2-13B",
    (8192, 28672, 80, 32000, 4096): "Llama-2-70B",
    (4096, 14336, 32, 128256, 8192): "Llama-3-8B",
    (8192, 28672, 80, 128256, 8192): "Llama-3-70B",
}


def model_of(config: Mapping[str, Any]) -> str | None:
    """Which model of the paper a `config.json` has the shape of; chat variants have it too."""
    return _SHAPES.get(tuple(config.get(field) for field in _FIELDS))


def shown_model(table: str, ours: str | None) -> str | None:
    """The model whose figures stand beside a table: ours if the paper has it; None: no figures."""
    if table not in _TABLES:
        return None
    figures, usual = _TABLES[table]
    return ours if ours in figures else usual


def figures(table: str, model: str | None, method: str | None) -> Figures | None:
    """The paper's line of `method`, or None if it has none."""
    if table not in _TABLES or model is None or method is None:
        return None
    return _FP16[model] if method == "FP16" else _TABLES[table][0][model].get(method)

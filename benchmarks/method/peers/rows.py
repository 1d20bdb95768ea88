"""The rows of the comparison: which quantizer, how it is called, and what it makes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from benchmarks.method.model_rows import FULL

GROUPS = "INT4 in groups of 64"
TOKENS = "per token, dynamic"


@dataclass(frozen=True)
class Peer:
    """One quantizer with its options.

    Attributes:
        module: child of this package that calls it.
        environment: folder of the virtual environment that has it.
        weights: how the weights are held.
        activations: how the inputs of the linear layers are rounded.
        options: what the child is told.
        windows: calibration windows; None for as many as the command says.
        distributions: whose versions are written beside the figures.
    """

    module: str
    environment: str
    weights: str = "-"
    activations: str = "-"
    options: Mapping[str, Any] = field(default_factory=dict)
    windows: int | None = None
    distributions: tuple[str, ...] = ("torch", "transformers")


COMPRESSOR = ("torch", "transformers", "llmcompressor", "compressed-tensors")


def compressor(
    scheme: str,
    weights: str,
    activations: str = "-",
    options: Mapping[str, Any] = MappingProxyType({}),
    windows: int | None = None,
) -> Peer:
    """A row of llm-compressor: a preset scheme, with what the options change of it."""
    told = {"scheme": scheme, **options}
    made = ("llm_compressor", "llm-compressor", weights, activations)
    return Peer(*made, told, windows, distributions=COMPRESSOR)


FOUR = (GROUPS, f"INT4 {TOKENS}")
EIGHT = ("INT8 per channel", f"INT8 {TOKENS}")
# The presets' groups of 128 do not divide a width of 576.
NARROW = {"group_size": 64}
SPIN = {**NARROW, "rotations": ["R1", "R2", "R4"]}
ROWS: dict[str, Peer] = {
    FULL: Peer("llm_compressor", "llm-compressor", distributions=COMPRESSOR),
    "llm-compressor W4A4: SpinQuant R1 R2 R4, GPTQ": compressor("W4A4", *FOUR, SPIN),
    "llm-compressor W4A4: GPTQ": compressor("W4A4", *FOUR, NARROW),
    "llm-compressor W4A4: SpinQuant R1 R2 R4, GPTQ, 32 windows": compressor(
        "W4A4", *FOUR, SPIN, 32
    ),
    "llm-compressor W4A4: GPTQ, 32 windows": compressor("W4A4", *FOUR, NARROW, 32),
    "llm-compressor W4A4: SpinQuant R1 R2 R4, GPTQ, per channel": compressor(
        "W4A4", "INT4 per channel", f"INT4 {TOKENS}", {**SPIN, "group_size": None}
    ),
    "llm-compressor W4A8: GPTQ": compressor("W4A8", GROUPS, f"INT8 {TOKENS}", NARROW),
    "llm-compressor W8A8: GPTQ": compressor("W8A8", *EIGHT),
    "llm-compressor W8A8: SmoothQuant, GPTQ": compressor("W8A8", *EIGHT, {"smooth": 0.8}),
    "llm-compressor W4A16: GPTQ": compressor("W4A16", GROUPS, options=NARROW),
    "AutoRound W4A16: 20 steps of 4 windows": Peer(
        "autoround",
        "auto-round",
        GROUPS,
        options={"scheme": "W4A16", "group_size": 64, "iters": 20, "batch_size": 4},
        distributions=("torch", "transformers", "auto-round"),
    ),
    "FlatQuant W4A4: 5 epochs instead of 15": Peer(
        "flatquant",
        "flatquant",
        "INT4 per channel",
        f"INT4 {TOKENS}",
        options={"epochs": 5},
    ),
}

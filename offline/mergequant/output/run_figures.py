"""Figures of one run, from `quantization_report.jsonl`: losses, clip ratios, outliers, bits, time.

Each is a matplotlib figure, or None where there is nothing to draw; `svg` makes it stand in a page
by itself, `draw_for_card` writes those that a model card shows.
"""

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergequant.errors import InputError

Line = Mapping[str, Any]  # of the report
_BLOCK = re.compile(r"\.(\d+)\.")
_SIZE = (9.0, 3.2)  # inches
_ENDS = ("lowest", "mean", "highest")  # of the clip ratios of an input's channels
_NOTHING = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # of metadata in an SVG


def require_matplotlib() -> None:
    """Raise InputError if figures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            'A report needs matplotlib: pip install "mergequant-vllm[plots]".'
        ) from error


def block_of(linear: str) -> int:
    """The number of the decoder block that a linear is in."""
    found = _BLOCK.search(linear)
    return int(found[1]) if found else 0


def by_kind(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Lines of each kind of linear, such as `q_proj`, in the order of the blocks."""
    kinds: dict[str, list[Line]] = {}
    for line in sorted(lines, key=lambda x: block_of(x["linear"])):
        kinds.setdefault(line["linear"].rpartition(".")[2], []).append(line)
    return kinds


def losses(lines: Sequence[Line]) -> Any | None:
    """Relative squared error at each linear's output: to nearest, by GPTQ, on held-out tokens."""
    drawn = {
        "loss_rtn": ("to nearest", ":", "tab:gray"),
        "loss_gptq": ("GPTQ", "-", "tab:blue"),
        "loss_held_out": ("GPTQ, held-out tokens", "--", "tab:orange"),
    }

    def draw(axis: Any, kind: Sequence[Line]) -> None:
        for field, (label, style, color) in drawn.items():
            known = [x for x in kind if x.get(field) is not None]
            blocks = [block_of(x["linear"]) for x in known]
            axis.plot(blocks, [x[field] for x in known], style, color=color, label=label)
        axis.set_yscale("log")

    return _small_multiples(lines, "relative squared error", draw)


def clips(lines: Sequence[Line]) -> Any | None:
    """Clip ratios: of static inputs the lowest, mean and highest of a channel, else the one."""

    def draw(axis: Any, kind: Sequence[Line]) -> None:
        known = [x for x in kind if x.get("clip") is not None]
        blocks = [block_of(x["linear"]) for x in known]
        ends = [_ends(x["clip"]) for x in known]
        low, mean, high = ([x[end] for x in ends] for end in _ENDS)
        axis.fill_between(blocks, low, high, alpha=0.25, label="of all channels")
        axis.plot(blocks, mean, label="mean, or the one of all tokens")
        axis.set_ylim(0, 1.05)

    return _small_multiples(lines, "clip ratio", draw)


def _ends(clip: float | Mapping[str, float]) -> Mapping[str, float]:
    """A static input's clip ratios; a dynamic one has the same for all of its channels."""
    return clip if isinstance(clip, Mapping) else dict.fromkeys(_ENDS, clip)


def training(lines: Sequence[Line]) -> Any | None:
    """Loss of each block at its output, before its training and after; None: none was trained."""
    trained = [x for x in lines if x.get("compensation")]
    if not trained:
        return None
    figure, axis = _figure()
    blocks = [block_of(x["linear"]) for x in trained]
    for field, label in (("loss_before", "before"), ("loss_after", "after")):
        axis.plot(blocks, [x["compensation"][field] for x in trained], "o-", label=label)
    axis.set(xlabel="block", ylabel="loss of the block", yscale="log")
    axis.legend()
    return figure


def seconds(lines: Sequence[Line]) -> Any | None:
    """Time of each block, by step."""
    times: dict[str, dict[int, float]] = {}
    for line in lines:
        for step, value in line["seconds"].items():
            blocks = times.setdefault(step, {})
            blocks[block_of(line["linear"])] = blocks.get(block_of(line["linear"]), 0) + value
    if not times:
        return None
    figure, axis = _figure()
    numbers = sorted({number for blocks in times.values() for number in blocks})
    bottom = [0.0] * len(numbers)
    for step, blocks in times.items():
        heights = [blocks.get(number, 0.0) for number in numbers]
        axis.bar(numbers, heights, bottom=bottom, label=step)
        bottom = [x + y for x, y in zip(bottom, heights, strict=True)]
    axis.set(xlabel="block", ylabel="seconds")
    axis.legend()
    return figure


def bits(linears: Mapping[str, tuple[int, int]]) -> Any | None:
    """A map of the bits of weights and activations, by linear and block.

    Args:
        linears: (weight bits, activation bits) of each, by full name.
    """
    inside = {name: x for name, x in linears.items() if _BLOCK.search(name)}
    if not inside:
        return None
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in inside))
    blocks = 1 + max(map(block_of, inside))
    grid = [[float("nan")] * blocks for _ in kinds]
    for name, (weight, activation) in inside.items():
        grid[kinds.index(name.rpartition(".")[2])][block_of(name)] = weight + activation
    figure, axis = _figure()
    image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=6, vmax=16)
    axis.set(xlabel="block", yticks=range(len(kinds)), yticklabels=kinds)
    figure.colorbar(image, label="bits of weight + of activation")
    return figure


def outliers(lines: Sequence[Line]) -> Any | None:
    """How far the largest channel behind each norm stands out, before transforms and after."""
    drawn = {
        "source": ("source model", ":", "tab:gray"),
        "channels": ("as transformed", "-", "tab:blue"),
        "columns": ("as reconstructed", "--", "tab:orange"),
    }

    def draw(axis: Any, kind: Sequence[Line]) -> None:
        for field, (label, style, color) in drawn.items():
            known = [x for x in kind if field in x["outliers"]]
            blocks = [block_of(x["linear"]) for x in known]
            ratios = [x["outliers"][field] for x in known]
            axis.plot(blocks, ratios, style, color=color, label=label)
        axis.set_yscale("log")

    seen: set[tuple[int, str]] = set()
    firsts = []  # the linears behind one norm read the same
    for line in lines:
        if line.get("outliers"):
            key = (block_of(line["linear"]), json.dumps(line["outliers"]))
            firsts += [] if key in seen else [line]
            seen.add(key)
    return _small_multiples(firsts, "largest channel / median", draw)


def memory(lines: Sequence[Line]) -> Any | None:
    """The most memory that the run had had by the end of each block."""
    known = [x for x in lines if x.get("peak_bytes")]
    if not known:
        return None
    figure, axis = _figure()
    for where in known[0]["peak_bytes"]:
        blocks = [block_of(x["linear"]) for x in known]
        axis.plot(blocks, [x["peak_bytes"][where] / 2**30 for x in known], label=where)
    axis.set(xlabel="block", ylabel="GiB so far", ylim=(0, None))
    axis.legend()
    return figure


CARD = {"loss": losses, "clip-ratios": clips, "outliers": outliers}
CARD_TEXTS = {
    "loss": "Relative squared error at each linear's output",
    "clip-ratios": "Clip ratios of each linear's input",
    "outliers": "Largest channel behind each norm over the median one",
}
CARD_FOLDER = "figures"


def draw_for_card(lines: Sequence[Line], folder: Path) -> dict[str, str]:
    """Write the figures of a model card as PNG.

    Args:
        folder: of the card; a folder of figures is made in it.

    Returns:
        path from `folder` of each, by what it shows; none without matplotlib.
    """
    try:
        require_matplotlib()
    except InputError:
        return {}
    from matplotlib import style

    files = {}
    for name, draw in CARD.items():
        with style.context("default"):  # the same picture whatever the user's settings
            figure = draw(lines)
        if figure is not None:
            file = f"{CARD_FOLDER}/{name}.png"
            (folder / CARD_FOLDER).mkdir(exist_ok=True)
            figure.savefig(folder / file, dpi=100, metadata={"Software": None})
            files[CARD_TEXTS[name]] = file
    return files


def _small_multiples(
    lines: Sequence[Line], label: str, draw: Callable[[Any, Sequence[Line]], None]
) -> Any | None:
    """A panel for each kind of linear, over the blocks, with one legend."""
    kinds = by_kind(lines)
    if not kinds:
        return None
    from matplotlib.figure import Figure

    rows = -(-len(kinds) // 4)
    figure = Figure(figsize=(_SIZE[0], 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False, sharex=True, sharey=True).flatten()
    for axis, (kind, own) in zip(axes, kinds.items(), strict=False):
        draw(axis, own)
        axis.set_title(kind, fontsize=9)
    for axis in axes[len(kinds) :]:
        axis.axis("off")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, fontsize=8)
    figure.supylabel(label, fontsize=9)
    figure.supxlabel("block", fontsize=9)
    return figure


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    return figure, figure.subplots()


def svg(figure: Any) -> str:
    """The figure's `<svg>` element; the same for the same figure."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "mergequant", "svg.fonttype": "none"}):
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata=_NOTHING)
    text = written.getvalue()
    return text[text.index("<svg") :]

"""The paper's tables as rows to run: which rows each has, and what the paper calls them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergequant.ablation.baselines import Baseline
from mergequant.ablation.rows import FULL, Row, RowMaker, Shapes
from mergequant.errors import InputError
from mergequant.options import Options
from mergequant.quantizer.columns import reconstructed_columns

NAMES = ("table1", "table4", "table5", "table7")  # of the paper: all are made if none is named
OUTLIERTUNE = "outliertune"
CHOICES = (*NAMES, OUTLIERTUNE)  # what `--paper` takes
FIGURE1 = "figure1"

_TENSOR: Mapping[str, Any] = {"baseline": Baseline(norm_step="tensor", tensor_mix=True)}
_SMOOTH: Mapping[str, Any] = {"baseline": Baseline(norm_step="smooth", tensor_mix=True)}
_DYNAMIC: Mapping[str, Any] = {"activations": "dynamic"}
_FULL = Row(FULL, "full precision", None, "FP16")


@dataclass(frozen=True)
class Table:
    """Rows that are printed together; those of `figure1` are drawn."""

    name: str
    title: str
    rows: tuple[Row, ...]


def chosen_tables(
    names: Sequence[str],
    figure1: bool,
    base: Options,
    widths: Mapping[str, int],
    shapes: Shapes | None = None,
) -> list[Table]:
    """The tables asked for, all if none is; each row's options are checked.

    Args:
        names: of `CHOICES`.
        figure1: also the rows of Figure 1.

    Raises:
        InputError: a table is unknown, or the model cannot be quantized as a row says.
    """
    unknown = [name for name in names if name not in CHOICES]
    if unknown:
        raise InputError(f"--paper {unknown[0]!r} is unknown: choose of {', '.join(CHOICES)}.")
    wanted = {*(names or NAMES), *([FIGURE1] if figure1 else [])}
    every = tables(base, widths, shapes)
    if base.reconstruction == "pad":
        reconstructed_columns(base, widths["hidden"])
    return [table for name, table in every.items() if name in wanted]


def tables(
    base: Options, widths: Mapping[str, int], shapes: Shapes | None = None
) -> dict[str, Table]:
    """Every table, by name, in the order in which they run.

    Args:
        base: what is common to the rows, see `RowMaker`.
        widths: of the model's spaces, see `mergequant.model.architecture.widths`.
        shapes: how rows are reconstructed, once that is decided, see `RowMaker`.
    """
    make = RowMaker(base, shapes or {})
    made = (
        _table4(make),
        _table1(make),
        _table5(make, _group_size(widths)),
        _table7(make),
        _outliertune(make),
        _figure1(make),
    )
    return {table.name: table for table in made}


def distinct(tables: Iterable[Table]) -> list[Row]:
    """The rows to run: each key once, full precision first."""
    rows = {row.key: row for table in tables for row in table.rows}
    return sorted(rows.values(), key=lambda row: row.options is not None)


def _table1(make: RowMaker) -> Table:
    def quarot(label: str, paper: str, rotation: str) -> Row:
        return make.row(label, paper, **_DYNAMIC, rotation=rotation, clipping="adaptive")

    rows = (
        _FULL,
        make.row("round to nearest, per token", **_DYNAMIC, weights="rtn"),
        make.row("SmoothQuant-like, static", "SmoothQuant", **_SMOOTH, weights="rtn"),
        quarot("QuaRot-like, per token, offline rotation", "QuaRot n-h", "offline"),
        make.method("MergeQuant, no rotation", "MergeQuant n-h", "none"),
        make.method("MergeQuant, offline rotation", "MergeQuant n-h", "offline"),
        quarot("QuaRot-like, per token, online rotation", "QuaRot", "online"),
        make.method("MergeQuant, online rotation", "MergeQuant", "online"),
    )
    return Table("table1", "Table 1: MergeQuant and the baselines, W4A4", rows)


def _table4(make: RowMaker) -> Table:
    online, none = _steps(make, "online", "rotation: "), _steps(make, "none", "no rotation: ")
    return Table("table4", "Table 4: step by step, W4A4", (_FULL, *online, *none))


def _steps(make: RowMaker, rotation: str, start: str) -> list[Row]:
    """Each row adds to the one before; only the rotated ones are in the paper.

    The paper's `+ QSM` has reconstruction, and o and down per token: its figure stands at the row
    that has all of these.
    """

    def step(label: str, paper: str | None = None, **changed: Any) -> Row:
        known = paper if rotation == "online" else None
        return make.row(f"{start}{label}", known, **{"rotation": rotation, **changed})

    shaped = make.shape(rotation)
    clipped = {**shaped, "clipping": "adaptive"}
    rows = [
        step("static per tensor", "QuaRot & Static", **_TENSOR),
        step("+ o and down per token", baseline=Baseline(norm_step="tensor")),
        step("+ QSM: steps per channel"),
        step("+ reconstruction", "+ QSM", **shaped),
        step("+ clipping", "+ Clipping", **clipped),
    ]
    if make.base.compensation_rank:
        rows.append(step("+ compensation", "+ Lora fine-tuning", **make.whole(rotation)))
    return rows


def _table5(make: RowMaker, group: int) -> Table:
    asymmetric = {"weight_bits": 3, "asymmetric": True}
    grouped = {"weight_bits": 3, "group_size": group}

    def quarot(label: str, paper: str, form: Mapping[str, Any]) -> Row:
        dynamic = {**_DYNAMIC, "clipping": "adaptive", "rotation": "online"}
        return make.row(f"QuaRot-like, {label}", paper, **dynamic, **form)

    def method(label: str, paper: str, form: Mapping[str, Any]) -> Row:
        return make.method(f"MergeQuant, {label}", paper, "online", **form)

    rows = (
        _FULL,
        quarot("3 bits with zero points", "QuaRot-w3-asym", asymmetric),
        quarot(f"3 bits in groups of {group}", "QuaRot-w3-group", grouped),
        method("3 bits with zero points", "MergeQuant-w3-asym", asymmetric),
        method(f"3 bits in groups of {group}", "MergeQuant-w3-group", grouped),
    )
    return Table("table5", "Table 5: W3A4, with rotation", rows)


def _table7(make: RowMaker) -> Table:
    def clipping(kind: str, label: str, paper: str) -> Row:
        return make.row(label, paper, Baseline(kept_weights=True), weights="rtn", clipping=kind)

    rows = (
        _FULL,
        clipping("none", "no clipping", "No-clipping"),
        clipping("channel", "channel clipping", "Channel-clipping"),
        clipping("adaptive", "adaptive clipping", "Adaptive clipping"),
    )
    return Table("table7", "Table 7: clipping, W16A4, no rotation", rows)


def _outliertune(make: RowMaker) -> Table:
    """Steps of OutlierTune (arXiv 2406.18832) at its widths and at 4 bits; o and down per token."""
    rows: list[Row] = [_FULL]
    for bits in (8, 6, 4):
        widths: dict[str, Any] = {"static_bits": bits, "dynamic_bits": bits, "weight_bits": bits}
        plain = {**widths, "weights": "rtn", "asymmetric": True}
        centred = {**plain, "static_zero_points": True}
        best = {**widths, "static_zero_points": True, "input_correction": True}
        start = f"W{bits}A{bits}: "
        tensor, smooth = Baseline(norm_step="tensor"), Baseline(norm_step="smooth")
        rows += [
            make.row(f"{start}static per tensor", baseline=tensor, **plain),
            make.row(f"{start}SmoothQuant-like", baseline=smooth, **plain),
            make.row(f"{start}pre-execution of dequantization", **plain),
            make.row(f"{start}+ symmetrization", baseline=Baseline(middle="windows"), **centred),
            make.row(f"{start}+ middles by our search", **centred, clipping="channel"),
            make.row(f"{start}+ GPTQ, correction, both clippings", **best, clipping="adaptive"),
        ]
    return Table(OUTLIERTUNE, "OutlierTune: static INT8, INT6 and INT4, no rotation", tuple(rows))


def _figure1(make: RowMaker) -> Table:
    """Three calibrations of the activations alone, all with GPTQ weights and without clipping."""
    kinds: Mapping[str, Mapping[str, Any]] = {
        "per-tensor static": _TENSOR,
        "per-token dynamic": _DYNAMIC,
        "per-channel static": {},
    }
    rows = [
        make.row(f"{label}{tail}", rotation=rotation, **changed)
        for label, changed in kinds.items()
        for rotation, tail in (("none", ""), ("online", " + rotation"))
    ]
    return Table(FIGURE1, "Figure 1: three calibrations, W4A4", (_FULL, *rows))


def _group_size(widths: Mapping[str, int]) -> int:
    """128 as in the paper, or less in a narrow model, so that each input has two groups."""
    narrowest = min(widths[name] for name in ("hidden", "queries", "intermediate"))
    return max(32, min(128, narrowest // 2 // 32 * 32))

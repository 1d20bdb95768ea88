"""The rows of the paper's tables, as options of `quantize`.

A row names every choice of the method that it stands for, whatever the defaults are; how many
samples, which seed and device, how weight steps are searched, and how reconstruction and
compensation work where a row has them, it takes from the options it is made of (`base`). Equal
options are one row, however many tables print it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergequant.options import Options

FULL = "full"
NAMES = ("table1", "table4", "table5", "table7")

# By rotation: `reconstruction`, and unless that is `none`, `alpha` and `max_extra_channels`.
Shapes = Mapping[str, Mapping[str, Any]]

# Nothing of the method but per-channel steps (QSM), o and down per token, and GPTQ.
_QSM: Mapping[str, Any] = {
    "activations": "static",
    "activation_step": "channel",
    "mix_activations": "token",
    "rotation": "none",
    "static_bits": 4,
    "dynamic_bits": 4,
    "reconstruction": "none",
    "split_by": "step",
    "staggered": False,
    "weights": "gptq",
    "weight_bits": 4,
    "group_size": None,
    "asymmetric": False,
    "clipping": "none",
    "compensation_rank": 0,
}
_TENSOR: Mapping[str, Any] = {"activation_step": "tensor", "mix_activations": "tensor"}
_SMOOTH: Mapping[str, Any] = {"activation_step": "smooth", "mix_activations": "tensor"}
_DYNAMIC: Mapping[str, Any] = {"activations": "dynamic"}


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        key: name of the row's file; the same for equal options.
        label: what the table calls it.
        options: how the model is quantized; None: not at all.
        paper: the method's name in the same table of the paper, if it is there.
    """

    key: str
    label: str
    options: Options | None
    paper: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows that are printed together. `name` is what `--paper` takes."""

    name: str
    title: str
    rows: tuple[Row, ...]


def tables(
    base: Options, widths: Mapping[str, int], shapes: Shapes | None = None
) -> dict[str, Table]:
    """Every table, by name, in the order in which they run.

    Args:
        base: what is common to the rows, see above.
        widths: of the model's spaces, see `mergequant.architecture.widths`.
        shapes: how rows of a rotation are reconstructed, see `Shapes`; else as `base` says.
    """
    maker = _Maker(base, shapes or {})
    made = (
        _table4(maker),
        _table1(maker),
        _table5(maker, _group_size(widths)),
        _table7(maker),
        _figure1(maker),
    )
    return {table.name: table for table in made}


def distinct(tables: Iterable[Table]) -> list[Row]:
    """The rows to run: each key once, full precision first."""
    rows = {row.key: row for table in tables for row in table.rows}
    return sorted(rows.values(), key=lambda row: row.options is not None)


@dataclass(frozen=True)
class _Maker:
    """Makes rows of a base."""

    base: Options
    shapes: Shapes

    def row(self, label: str, paper: str | None = None, **changed: Any) -> Row:
        """Plain step migration with GPTQ but for the fields in `changed`."""
        options = Options.model_validate({**self.base.model_dump(), **_QSM, **changed})
        return Row(key_of(options), label, options, paper)

    def method(self, label: str, paper: str | None, rotation: str, **changed: Any) -> Row:
        """The whole method."""
        return self.row(label, paper, **{**self.whole(rotation), **changed})

    def whole(self, rotation: str) -> dict[str, Any]:
        """Reconstruction, both clippings, compensation (unless the base has rank 0)."""
        compensation = {"compensation_rank": self.base.compensation_rank}
        return {**self.shape(rotation), "clipping": "adaptive", **compensation}

    def shape(self, rotation: str) -> dict[str, Any]:
        """Rotation and reconstruction."""
        base = self.base
        usual = {"reconstruction": base.reconstruction if _reconstructs(base) else "auto"}
        shape = self.shapes.get(rotation, usual)
        if shape["reconstruction"] == "none":
            return {"rotation": rotation}
        manner = {"split_by": base.split_by, "staggered": base.staggered}
        return {"rotation": rotation, **manner, **shape}


def whole(base: Options, rotation: str) -> Options:
    """The whole method at 4 bits, as `base` says."""
    found = _Maker(base, {}).method("MergeQuant", None, rotation).options
    assert found is not None
    return found


def _reconstructs(options: Options) -> bool:
    return options.reconstruction != "none"


def key_of(options: Options) -> str:
    """A file's name that says every field in which rows differ; equal for equal rows."""
    parts: list[str] = [options.activations]
    if options.activations == "static":
        parts = [f"static-{options.activation_step}"]
        parts += ["mix-tensor"] * (options.mix_activations == "tensor")
    parts += [f"rotation-{options.rotation}"] * (options.rotation != "none")
    parts += [options.weights]
    parts += [f"w{options.weight_bits}"] * (options.weight_bits != 4)
    parts += ["asym"] * options.asymmetric
    parts += [f"g{options.group_size}"] * (options.group_size is not None)
    parts += [options.reconstruction] * (options.reconstruction != "none")
    parts += [f"clip-{options.clipping}"] * (options.clipping != "none")
    parts += ["compensated"] * (options.compensation_rank > 0)
    return ".".join(parts)


def _full() -> Row:
    return Row(FULL, "full precision", None, "FP16")


def _table1(make: _Maker) -> Table:
    def quarot(label: str, paper: str, rotation: str) -> Row:
        return make.row(label, paper, **_DYNAMIC, rotation=rotation, clipping="adaptive")

    rows = (
        _full(),
        make.row("round to nearest, per token", **_DYNAMIC, weights="rtn"),
        make.row("SmoothQuant-like, static", "SmoothQuant", **_SMOOTH, weights="rtn"),
        quarot("QuaRot-like, per token, offline rotation", "QuaRot n-h", "offline"),
        make.method("MergeQuant, no rotation", "MergeQuant n-h", "none"),
        make.method("MergeQuant, offline rotation", "MergeQuant n-h", "offline"),
        quarot("QuaRot-like, per token, online rotation", "QuaRot", "online"),
        make.method("MergeQuant, online rotation", "MergeQuant", "online"),
    )
    return Table("table1", "Table 1: MergeQuant and the baselines, W4A4", rows)


def _table4(make: _Maker) -> Table:
    online, none = _steps(make, "online", "rotation: "), _steps(make, "none", "no rotation: ")
    return Table("table4", "Table 4: step by step, W4A4", (_full(), *online, *none))


def _steps(make: _Maker, rotation: str, start: str) -> list[Row]:
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
        step("+ o and down per token", activation_step="tensor"),
        step("+ QSM: steps per channel"),
        step("+ reconstruction", "+ QSM", **shaped),
        step("+ clipping", "+ Clipping", **clipped),
    ]
    if make.base.compensation_rank:
        rows.append(step("+ compensation", "+ Lora fine-tuning", **make.whole(rotation)))
    return rows


def _table5(make: _Maker, group: int) -> Table:
    asymmetric = {"weight_bits": 3, "asymmetric": True}
    grouped = {"weight_bits": 3, "group_size": group}

    def quarot(label: str, paper: str, form: Mapping[str, Any]) -> Row:
        dynamic = {**_DYNAMIC, "clipping": "adaptive", "rotation": "online"}
        return make.row(f"QuaRot-like, {label}", paper, **dynamic, **form)

    def method(label: str, paper: str, form: Mapping[str, Any]) -> Row:
        return make.method(f"MergeQuant, {label}", paper, "online", **form)

    rows = (
        _full(),
        quarot("3 bits with zero points", "QuaRot-w3-asym", asymmetric),
        quarot(f"3 bits in groups of {group}", "QuaRot-w3-group", grouped),
        method("3 bits with zero points", "MergeQuant-w3-asym", asymmetric),
        method(f"3 bits in groups of {group}", "MergeQuant-w3-group", grouped),
    )
    return Table("table5", "Table 5: W3A4, with rotation", rows)


def _table7(make: _Maker) -> Table:
    def clipping(kind: str, label: str, paper: str) -> Row:
        return make.row(label, paper, weights="none", clipping=kind)

    rows = (
        _full(),
        clipping("none", "no clipping", "No-clipping"),
        clipping("channel", "channel clipping", "Channel-clipping"),
        clipping("adaptive", "adaptive clipping", "Adaptive clipping"),
    )
    return Table("table7", "Table 7: clipping, W16A4, no rotation", rows)


def _figure1(make: _Maker) -> Table:
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
    return Table("figure1", "Figure 1: three calibrations, W4A4", (_full(), *rows))


def _group_size(widths: Mapping[str, int]) -> int:
    """128 as in the paper, or less in a narrow model, so that each input has two groups."""
    narrowest = min(widths[name] for name in ("hidden", "queries", "intermediate"))
    return max(32, min(128, narrowest // 2 // 32 * 32))

"""One row of the paper's tables: a label, and options of `quantize`.

A row names every choice of the method that it stands for, whatever the defaults are; how many
samples, which seed and device, how weight steps are searched, and how reconstruction and
compensation work where a row has them, it takes from the options it is made of (`base`). Equal
options are one row, however many tables print it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mergequant.ablation.baselines import PLAIN, Baseline
from mergequant.options import Options

FULL = "full"

# By rotation: `reconstruction`, and unless that is `none`, `alpha` and `max_extra_channels`.
Shapes = Mapping[str, Mapping[str, Any]]

# Nothing of the method but per-channel steps (QSM), o and down per token, and GPTQ.
_QSM: Mapping[str, Any] = {
    "activations": "static",
    "rotation": "none",
    "residual_rotation": "full",
    "equalization": False,
    "static_bits": 4,
    "dynamic_bits": 4,
    "reconstruction": "none",
    "split_by": "step",
    "staggered": False,
    "weights": "gptq",
    "weight_bits": 4,
    "head_bits": 16,  # the paper quantizes blocks alone
    "group_size": None,
    "segments": None,
    "asymmetric": False,
    "input_correction": False,
    "static_zero_points": False,
    "dynamic_zero_points": False,
    "mix_heads": 0,
    "clipping": "none",
    "compensation": "low_rank",
    "compensation_rank": 0,
    "average_bits": None,
    "within": None,
}


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        key: name of the row's file; the same for equal options.
        label: what the table calls it.
        options: how the model is quantized; None: not at all.
        paper: the method's name in the same table of the paper, if it is there.
        baseline: what of the method it goes without that no option takes away.
    """

    key: str
    label: str
    options: Options | None
    paper: str | None = None
    baseline: Baseline = PLAIN

    @property
    def options_as_json(self) -> dict[str, Any] | None:
        """Options as the row's record has them."""
        if self.options is None:
            return None
        plain = asdict(PLAIN)
        given = {x: value for x, value in asdict(self.baseline).items() if value != plain[x]}
        return {**self.options.model_dump(mode="json"), **given}


@dataclass(frozen=True)
class RowMaker:
    """Makes the rows of a base.

    Attributes:
        base: what is common to the rows, see the head of this file.
        shapes: how rows of a rotation are reconstructed; where it does not say, as `base` does.
    """

    base: Options
    shapes: Shapes

    def row(
        self, label: str, paper: str | None = None, baseline: Baseline = PLAIN, **changed: Any
    ) -> Row:
        """Plain step migration with GPTQ but for the fields in `changed`."""
        options = self._options(changed)
        return Row(key_of(options, baseline), label, options, paper, baseline)

    def method(self, label: str, paper: str | None, rotation: str, **changed: Any) -> Row:
        """The whole method but for the fields in `changed`."""
        return self.row(label, paper, **{**self.whole(rotation), **changed})

    def whole(self, rotation: str) -> dict[str, Any]:
        """Fields: reconstruction, both clippings, compensation (unless the base has rank 0)."""
        compensation = {"compensation_rank": self.base.compensation_rank}
        return {**self.shape(rotation), "clipping": "adaptive", **compensation}

    def shape(self, rotation: str) -> dict[str, Any]:
        """Fields: rotation and reconstruction."""
        base = self.base
        mode = "auto" if base.reconstruction == "none" else base.reconstruction
        shape = self.shapes.get(rotation, {"reconstruction": mode})
        if shape["reconstruction"] == "none":
            return {"rotation": rotation}
        manner = {"split_by": base.split_by, "staggered": base.staggered}
        return {"rotation": rotation, **manner, **shape}

    def whole_options(self, rotation: str) -> Options:
        """The whole method at 4 bits."""
        return self._options(self.whole(rotation))

    def _options(self, changed: Mapping[str, Any]) -> Options:
        return Options.model_validate({**self.base.model_dump(), **_QSM, **changed})


def key_of(options: Options, baseline: Baseline = PLAIN) -> str:
    """A file's name that says every field in which rows differ; equal for equal rows."""
    parts: list[str] = [options.activations]
    if options.activations != "dynamic":
        parts = [f"static-{baseline.norm_step}"]
        parts += ["mix-tensor"] * (baseline.tensor_mix)
        parts += [f"a{options.static_bits}"] * (options.static_bits != 4)
        parts += [f"middle-{baseline.middle}"] * options.static_zero_points
    parts += [f"rotation-{options.rotation}"] * (options.rotation != "none")
    parts += ["none" if baseline.kept_weights else options.weights]
    parts += [f"w{options.weight_bits}"] * (options.weight_bits != 4)
    parts += ["asym"] * options.asymmetric
    parts += ["corrected"] * options.input_correction
    parts += [f"g{options.group_size}"] * (options.group_size is not None)
    parts += [options.reconstruction] * (options.reconstruction != "none")
    parts += [f"clip-{options.clipping}"] * (options.clipping != "none")
    parts += ["compensated"] * (options.compensation_rank > 0)
    return ".".join(parts)

"""The model card: `README.md` of a checkpoint, in the Hugging Face hub's form.

What was measured later goes between two marks, by `with_evaluation`.
"""

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergequant.cli_flags import spelled
from mergequant_vllm.format import CheckpointFormat, LinearFormat

BEGIN, END = "<!-- evaluation -->", "<!-- end of evaluation -->"
_NOT_MEASURED = (
    "Not measured on other text yet: `mergequant evaluate BASE CHECKPOINT --text FILE` fills this "
    "in."
)
_HUB_CACHE = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[0-9a-f]+/?$")
_LICENSE = re.compile(r"^license(?:_name|_link)?:.*$", re.MULTILINE)

_CARD = """\
---
base_model: {base}
library_name: vllm
quantized_by: mergequant
{license}tags:
- mergequant
- vllm
- {scheme}
---

# {name}, {scheme} by MergeQuant

{base} with integer weights and activations, for [vLLM](https://docs.vllm.ai) with the plugin
`mergequant-vllm`.

| linears | weights | activations |
|---|---|---|
{rows}

*Static*: a step a channel, measured once and stored within the norm before it. *Dynamic*: a step a
token. {left}

## Serve

```sh
vllm serve FOLDER_OR_NAME_OF_THIS_MODEL  # with mergequant-vllm installed beside vLLM
```

## How it was made

```sh
{command}
```

Versions: {versions}. Seed {seed}. sha256 of the calibration tokens:
`{calibration}`.
{programs}
## Evaluation

{begin}
{evaluation}
{end}

{figures}## Limits

Quantizing loses accuracy, most where inputs are far from the calibration text: measure on your own
task. What the base model cannot do, or should not be used for, holds for this one as well.
"""


@dataclass(frozen=True)
class CalibrationLoss:
    """Loss on some of the text that a checkpoint was fitted to, nats a token.

    Attributes:
        before: of the source model.
        after: of the checkpoint.
    """

    before: float
    after: float

    def sentence(self) -> str:
        """What it says, and what it does not."""
        more = self.after - self.before
        side = "above" if more >= 0 else "below"
        expected = ": expect as much or somewhat more on other text" if more >= 0 else ""
        return (
            f"On calibration text the loss is {self.after:.3f} nats a token (the head in 16 bits), "
            f"{abs(more):.3f} {side} the source model's{expected}."
        )


def model_card(
    source: Path,
    checkpoint: CheckpointFormat,
    seen: CalibrationLoss | None = None,
    figures: Mapping[str, str] | None = None,
    programs: Sequence[str] = (),
) -> str:
    """The card of a checkpoint, nothing of it measured yet on other text.

    Args:
        source: folder of the source model, whose `README.md` may name a licence.
        seen: loss on calibration text, if it was measured.
        figures: files that lie beside the card, by what they show.
        programs: files of the source's code that were copied along.
    """
    base = base_name(source)
    made = checkpoint.provenance
    options = dict(made.options)
    command = ["mergequant", "quantize", base, "OUTPUT", "--calibration", "TEXT"]
    left = [name for name, _ in checkpoint.entries() if name not in checkpoint.quantized]
    return _CARD.format(
        base=base,
        license=_license(source),
        scheme=_scheme(checkpoint),
        name=base.rpartition("/")[2],
        rows="\n".join(_rows(checkpoint.quantized)),
        left=f"Not quantized: {', '.join((*left, 'norms'))}, embedding.",
        command=shlex.join([*command, *spelled(options)]),
        versions=", ".join(f"{name} {version}" for name, version in made.versions.items()),
        seed=options.get("seed"),
        calibration=made.calibration_sha256,
        begin=BEGIN,
        evaluation=_NOT_MEASURED if seen is None else f"{seen.sentence()} {_NOT_MEASURED}",
        programs=f"\nIt brings code of the source: {', '.join(programs)}.\n" if programs else "",
        figures="".join(f"![{what}]({file})\n\n" for what, file in (figures or {}).items()),
        end=END,
    )


def base_name(source: Path) -> str:
    """A model's name: the hub's if its folder is of the hub's cache, else the folder's."""
    cached = _HUB_CACHE.search(str(source))
    return f"{cached[1]}/{cached[2]}" if cached else source.resolve().name


def _license(source: Path) -> str:
    """The licence lines of the source's card, each ended."""
    file = source / "README.md"
    if not file.is_file():
        return ""
    text = file.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return ""
    head = text[3:].partition("\n---")[0]
    return "".join(f"{line}\n" for line in _LICENSE.findall(head))


def _scheme(checkpoint: CheckpointFormat) -> str:
    """Such as w4a4: the bits that most linears have."""
    forms = Counter((x.weight.bits, x.input.bits) for x in checkpoint.quantized.values())
    weights, activations = forms.most_common(1)[0][0]
    return f"w{weights}a{activations}"


def _rows(quantized: Mapping[str, LinearFormat]) -> Sequence[str]:
    """A line for each form, with the linears that have it, all blocks' together."""
    forms: dict[tuple[str, str], list[str]] = {}
    for name, linear in quantized.items():
        inputs = f"{linear.input.bits} bits, {linear.input.kind}"
        forms.setdefault((f"{linear.weight.bits} bits", inputs), []).append(name)
    return [
        f"| {_together(names)} | {weights} | {inputs} |"
        for (weights, inputs), names in forms.items()
    ]


def _together(names: Sequence[str]) -> str:
    """Names without their blocks, each with how many there are."""
    counts = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def with_evaluation(card: str, table: str) -> str:
    """The card with a table in the place of what was measured before."""
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return f"{card.rstrip()}\n\n## Evaluation\n\n{BEGIN}\n{table}\n{END}\n"
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def evaluation_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of measured figures: `what`, `base`, `quantized`, `recovery`, as numbers or text."""
    lines = ["| | base | quantized | recovery, % |", "|---|---:|---:|---:|"]
    for row in rows:
        figures = " | ".join(str(row[key]) for key in ("base", "quantized"))
        lines.append(f"| {row['what']} | {figures} | {row['recovery']:.1f} |")
    return "\n".join(lines)

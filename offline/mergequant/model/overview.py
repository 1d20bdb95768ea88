"""How the linears of each model type are served, as tables say: for `mergequant architectures`."""

from collections.abc import Iterator, Mapping
from typing import Any

from mergequant.model.architecture import MIDDLE, MIX, Architecture, Linear, Readers
from mergequant.model.equalized_reader import is_carried
from mergequant.model.rotated_reader import fixed_residual

_HEADS: Mapping[str, str] = {
    "any": "8 bits, or 16 if asked",
    "16_bit": "16 bits: vLLM's class takes no quantized one",
    "tied": "the embedding, in 16 bits: vLLM's class knows no other",
}


def overview(architectures: Mapping[str, Architecture]) -> str:
    """A line for each model type."""
    rows = [("model type", "a static step per channel", "a step per token", "rotated", "head")]
    for kind, architecture in architectures.items():
        static, dynamic = (_names(architecture, norm_fed=x) for x in (True, False))
        turns = "R1, R2, R4" if fixed_residual(architecture) is None else "R2, R4"
        head = {"any": "8 bits", "16_bit": "16 bits", "tied": "tied"}[architecture.served_head]
        rows.append((kind, static or "-", dynamic, turns, head))
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(x.ljust(n) for x, n in zip(row, width, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def details(architecture: Architecture) -> str:
    """Everything that the table of one model type says of serving it."""
    lines = [architecture.model_type]
    for readers in architecture.readers():
        for linear in readers.linears:
            carried = ""
            if readers.norm is None and is_carried(architecture, readers.space):
                carried = "; static with --activations fully_static"
            lines.append(f"  {linear.name}: {_how(readers)}{carried}{_parts(linear)}")
    lines.append(f"  {architecture.head.name} (head): {_HEADS[architecture.served_head]}")
    fixed = fixed_residual(architecture)
    lines.append(
        f"  rotation: {'R1, R2, R4' if fixed is None else f'R2 and R4 alone, since {fixed}'}"
    )
    for field, value in architecture.served_with.items():
        lines.append(f"  only with {field} {value!r} in config.json, as vLLM serves it")
    for field, keys in architecture.restated.items():
        lines.append(f"  {field} in config.json, for vLLM, made of {', '.join(keys.values())}")
    if architecture.bare_inputs:
        lines.append("  fused linears without reconstruction: vLLM reorders all their tensors")
    return "\n".join(lines)


def as_records(architectures: Mapping[str, Architecture]) -> dict[str, Any]:
    """The same for programs: by model type, how each linear is served."""
    return {
        kind: {
            "linears": {
                linear.name: {"static": x.norm is not None, "how": _how(x)}
                for x in table.readers()
                for linear in x.linears
            },
            "head": table.served_head,
            "residual_rotation": fixed_residual(table) is None,
            "served_with": dict(table.served_with),
            "restated": {field: dict(keys) for field, keys in table.restated.items()},
        }
        for kind, table in architectures.items()
    }


def _names(architecture: Architecture, *, norm_fed: bool) -> str:
    """Short names of the linears that a norm feeds, or of the others; inputs by semicolons."""
    groups: Iterator[Readers] = (
        x for x in architecture.readers() if (x.norm is not None) == norm_fed
    )
    return "; ".join(group.title for group in groups)


def _parts(linear: Linear) -> str:
    """What a fused matrix holds."""
    if len(linear.written) == 1:
        return ""
    order = ", head by head" if linear.per_head else ""
    return f" (one matrix: {', '.join(linear.written)}{order})"


def _how(readers: Readers) -> str:
    if readers.norm is not None:
        shift = ", its middle in the norm's bias" if readers.norm.bias else ""
        return f"a static step per channel, in {readers.norm.name}{shift}"
    reasons = {
        MIX: "attention stands between it and the norm",
        MIDDLE: "the activation function stands between it and the norm",
    }
    reason = reasons.get(readers.space, "it reads the residual itself, with no norm in front")
    return f"a step per token: {reason}"

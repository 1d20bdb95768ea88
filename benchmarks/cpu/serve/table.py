"""Tables of part `serve`: speeds, ratios in the same round, memory."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.shapes import MODELS, Model
from benchmarks.cpu.linear.timing import quartiles
from benchmarks.cpu.serve.measure import BATCHES, SHORT_PROMPT
from benchmarks.cpu.serve.variants import BASELINE, VARIANTS, Variant

Row = Mapping[str, Any]
Rounds = Sequence[Mapping[str, float]]
MIB = 2**20

HEAD = """\
{model}'s shape, {layers} blocks, random weights. Tokens a second. Prefill: a prompt of {prefill}
tokens until its first token. Decoding: {decode} tokens after a prompt of {short}, the time of the
first token taken off. Ours and each other one run in turns, one other at a time; speedups are ours
over theirs within a round, median, in brackets the quartiles. vLLM: prefix caching off, key-value
cache of 1 GiB in the dtype of its name, compiled; its int8 and w4a16 are compressed-tensors
checkpoints on the kernels that vLLM chooses. llama.cpp: cache in float16."""
BOUND = """\
Decoding reads all weights for each token. Bound: {read:.1f} GB/s, measured with the same threads
before each comparison, median, over those bytes; cache and activations left out, and steps except
those of llama.cpp's blocks."""
MEMORY = """\
Weights are counted as packed, embedding, head and cache in the dtype that they are served in; vLLM
itself is what {baseline} has resident beyond those three and a second copy of its head."""


def table(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """Tables in Markdown."""
    model = MODELS[options.model]
    layers = options.layers or model.num_hidden_layers
    head = HEAD.format(
        model=model.name,
        layers=layers,
        prefill=options.prefill,
        decode=options.decode,
        short=SHORT_PROMPT,
    )
    done = [row for row in rows if "theirs" in row]
    parts = [head, _speeds(done, options), _speedups(done, options)]
    parts += [_bounds(done, options, model, layers), _memory(done, model, layers)]
    parts.append("\n".join(_troubles(rows)))
    return "\n\n".join(part for part in parts if part)


def speeds(rounds: Rounds, options: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens a second of each round, by phase."""
    rates = {"prefill": [options.prefill / one["prefill"] for one in rounds]}
    for batch in BATCHES:
        seconds = [one[f"decode {batch}"] - one[f"first {batch}"] for one in rounds]
        rates[f"decode, batch {batch}"] = [batch * options.decode / max(x, 1e-9) for x in seconds]
    return rates


def speedups(row: Row, options: argparse.Namespace) -> dict[str, tuple[float, float, float]]:
    """Ours over theirs, by phase: median and quartiles over the rounds."""
    ours, theirs = (speeds(row[who]["rounds"], options) for who in ("ours", "theirs"))
    return {
        phase: quartiles([a / b for a, b in zip(ours[phase], theirs[phase], strict=True)])
        for phase in ours
    }


def expected_bytes(variant: Variant, model: Model, layers: int) -> dict[str, float]:
    """Bytes that weights, embedding and head must take at least."""
    weights = layers * sum(linear.n * linear.k for linear in model.linears())
    table = model.vocab_size * model.hidden_size
    bits = variant.embedding_bits
    bits += variant.head_bits if _has_head(variant, model) else 0
    return {"weights": weights * variant.bits / 8, "embedding and head": table * bits / 8}


def _speeds(rows: Sequence[Row], options: argparse.Namespace) -> str:
    phases: list[str] = []
    lines: list[str] = []
    for name, engine, rounds in _participants(rows):
        rates = speeds(rounds, options)
        if not lines:
            phases = list(rates)
            lines = [f"| tokens/s | {' | '.join(phases)} | rounds | engine |"]
            lines.append("|---" * (len(phases) + 3) + "|")
        cells = [f"{quartiles(rates[phase])[0]:.2f}" for phase in phases]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(rounds)} | {engine} |")
    return "\n".join(lines)


def _participants(rows: Sequence[Row]) -> list[tuple[str, str, Rounds]]:
    """Name, engine and rounds of ours (all that it took part in) and of each other variant."""
    participants: list[tuple[str, str, Rounds]] = []
    if rows:
        ours = rows[0]["ours"]
        rounds = [one for row in rows for one in row["ours"]["rounds"]]
        participants.append((ours["name"], ours["facts"]["engine"], rounds))
    for row in rows:
        if row["name"] != row["ours"]["name"]:
            participants.append(
                (row["name"], row["theirs"]["facts"]["engine"], row["theirs"]["rounds"])
            )
    return participants


def _speedups(rows: Sequence[Row], options: argparse.Namespace) -> str:
    others = [row for row in rows if row["name"] != row["ours"]["name"]]
    if not others:
        return ""
    phases = list(speedups(others[0], options))
    lines = [f"| ours against | {' | '.join(phases)} |", "|---" * (len(phases) + 1) + "|"]
    for row in others:
        ratios = speedups(row, options)
        cells = (f"{m:.2f} ({low:.2f}-{high:.2f})" for m, low, high in ratios.values())
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_bytes(variant: Variant, model: Model, layers: int) -> float:
    """Bytes of weights that a decoded token reads: those of the blocks, and the head's."""
    bits = variant.head_bits if _has_head(variant, model) else variant.embedding_bits
    head = model.vocab_size * model.hidden_size * bits / 8
    return expected_bytes(variant, model, layers)["weights"] + head


def _has_head(variant: Variant, model: Model) -> bool:
    """Whether the head is a tensor of its own, and not the embedding."""
    return not model.tie_word_embeddings or variant.head_bits != variant.embedding_bits


def _bounds(rows: Sequence[Row], options: argparse.Namespace, model: Model, layers: int) -> str:
    """Tokens a second that memory allows at batch 1, and how much of it each reaches."""
    if not rows or any("bandwidth" not in row for row in rows):
        return ""
    read = quartiles([row["bandwidth"] for row in rows])[0]
    lines = ["| batch 1 | reads, MiB a token | bound, tokens/s | reached |", "|---" * 4 + "|"]
    for name, _, rounds in _participants(rows):
        size = read_bytes(VARIANTS[name], model, layers)
        reached = quartiles(speeds(rounds, options)["decode, batch 1"])[0] * size / read
        lines.append(f"| {name} | {size / MIB:.0f} | {read / size:.1f} | {reached:.0%} |")
    return BOUND.format(read=read / 1e9) + "\n\n" + "\n".join(lines)


def _memory(rows: Sequence[Row], model: Model, layers: int) -> str:
    """Resident memory beside what must be there."""
    facts = {row["ours"]["name"]: row["ours"]["facts"] for row in rows}
    facts |= {row["name"]: row["theirs"]["facts"] for row in rows}
    parts = {name: _parts(name, facts[name], model, layers) for name in facts}
    own = None  # what vLLM takes for itself
    if BASELINE in facts:
        own = facts[BASELINE]["resident"] - sum(parts[BASELINE].values())
        own -= model.vocab_size * model.hidden_size * VARIANTS[BASELINE].head_bits / 8
    lines = [
        "| MiB | resident | must be | more | weights | embedding and head | cache | vLLM itself |",
        "|---" * 8 + "|",
    ]
    for name, fact in facts.items():
        itself = own if VARIANTS[name].served is not None else None
        must = None if itself is None else sum(parts[name].values()) + itself
        sizes = (_mebibytes(size) for size in (*parts[name].values(), itself))
        more = "-" if must is None else f"{fact['resident'] / must - 1:+.1%}"
        whole = f"{_mebibytes(fact['resident'])} | {_mebibytes(must)} | {more}"
        lines.append(f"| {name} | {whole} | {' | '.join(sizes)} |")
    lines += ["", MEMORY.format(baseline=BASELINE)]
    return "\n".join(lines) if rows else ""


def _parts(name: str, fact: Mapping[str, Any], model: Model, layers: int) -> dict[str, float]:
    return {**expected_bytes(VARIANTS[name], model, layers), "cache": fact["cache_bytes"]}


def _mebibytes(size: float | None) -> str:
    return "-" if size is None else f"{size / MIB:.0f}"


def _troubles(rows: Sequence[Row]) -> list[str]:
    return [
        f"- {word.upper()} {row['name']}: {row[word]}"
        for row in rows
        for word in ("refused", "failed")
        if word in row
    ]

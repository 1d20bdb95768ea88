"""Part `tune`: tiles of the Triton kernel for real shapes, searched, and written where it looks.

A cell is one linear (N, K, weight bits) and one number of tokens; its search starts at the default
tile and changes one thing at a time as long as that helps. Linears with all their cells done go
into the table of this GPU.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common.device import KERNELS, Device, synchronize
from benchmarks.common.result_cells import Cells, Record, Refused
from benchmarks.common.shapes import GPU_MODELS, Linear, distinct
from benchmarks.gpu.context import Context
from benchmarks.gpu.gemm.measure import Subjects, make_spec
from benchmarks.gpu.timing import ROUND_SECONDS, make_runner, repeats
from mergequant_vllm.kernels.linear.triton import operator as triton_operator
from mergequant_vllm.kernels.linear.triton import tile_tables
from mergequant_vllm.kernels.linear.triton.tiles import (
    LinearShape,
    Tile,
    candidates,
    default_tile,
    shared_limit,
)

TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
SMOKE_TOKENS = (16,)
WEIGHT_BITS = (4, 3, 8)
BETTER = 0.99  # a tile is preferred when it takes at most so much of the other's time
FIELDS = ("block_n", "block_m", "block_k", "num_stages", "num_warps")

TimeOf = Callable[[Tile], float]  # seconds of one call; infinite if the tile does not run


def run(context: Context) -> None:
    """Search for every linear and number of tokens that is not done."""
    models = ("tiny",) if context.smoke else context.options.get("models") or GPU_MODELS
    tokens = SMOKE_TOKENS if context.smoke else TOKENS
    widths = WEIGHT_BITS[:1] if context.smoke else WEIGHT_BITS
    shapes = {linear[1:3]: linear for _, linear in distinct(tuple(models))}
    try:
        for bits in widths:
            for linear in shapes.values():
                _tune_linear(context, linear, bits, tokens)
    finally:
        _write(context, shapes.values(), widths, tokens)


def _tune_linear(context: Context, linear: Linear, bits: int, tokens: tuple[int, ...]) -> None:
    keys = {_key(linear, bits, m): m for m in tokens}
    wanted = context.cells.pending(keys)
    if not wanted:
        return
    spec = replace(make_spec(linear, context.device), weight_bits=bits, dynamic=False)
    subjects = Subjects(linear, context.device, spec=spec)
    for key in wanted:
        context.measure(key, functools.partial(_search, context, subjects, keys[key]))


def _key(linear: Linear, bits: int, m: int) -> str:
    return f"N={linear.n} K={linear.k} W{bits} M={m}"


def _shape(linear: Linear, bits: int) -> LinearShape:
    return LinearShape(linear.n, linear.k, bits, None)


def _search(context: Context, subjects: Subjects, m: int) -> Record:
    shape = _shape(subjects.linear, subjects.spec.weight_bits)
    limit = shared_limit(context.device.capability)
    pool = candidates(shape, m, limit)
    if context.smoke:
        pool = pool[:3]
    start = default_tile(shape, m, limit)
    timer = functools.partial(_seconds, subjects, m, context.device, context.smoke)
    begin = time.perf_counter()
    best, times = descend(start, pool, timer)
    return {
        "tile": best._asdict(),
        "us": round(times[best] * 1e6, 2),
        "default": start._asdict(),
        "default_us": round(times[start] * 1e6, 2),
        "tried": len(times),
        "do_not_run": sum(seconds == float("inf") for seconds in times.values()),
        "search_seconds": round(time.perf_counter() - begin, 1),
    }


def descend(start: Tile, pool: Iterable[Tile], time_of: TimeOf) -> tuple[Tile, dict[Tile, float]]:
    """Change one field of the tile at a time (and the warps with it) while that is faster.

    Returns:
        the best tile found, and the time of each that was tried.

    Raises:
        RuntimeError: not even one tile runs.
    """
    known = list(pool)
    times = {start: time_of(start)}
    best, improved = start, True
    while improved:
        improved = False
        for field in FIELDS:
            free = {field, "num_warps"}
            for tile in known:
                fixed = [name for name in FIELDS if name not in free]
                if tile in times or any(getattr(tile, f) != getattr(best, f) for f in fixed):
                    continue
                times[tile] = time_of(tile)
            fastest = min(times, key=lambda tile: times[tile])
            if times[fastest] < BETTER * times[best]:
                best, improved = fastest, True
    if times[best] == float("inf"):
        raise RuntimeError(f"none of {len(times)} tiles runs")
    return best, times


def _seconds(subjects: Subjects, m: int, device: Device, smoke: bool, tile: Tile) -> float:
    with forced(tile):
        try:
            calls = subjects.calls("triton", m)
            runner = make_runner(calls, device, round_seconds=0 if smoke else ROUND_SECONDS / 2)
            repeat = 1 if smoke else repeats(runner, ROUND_SECONDS / 2)
            rounds = [runner.seconds(repeat) for _ in range(1 if smoke else 3)]
        except Refused:
            raise
        except Exception:  # most likely too large for this GPU after all
            synchronize(device)  # raises if it is worse
            return float("inf")
    return min(rounds) / (repeat * runner.calls)


@contextlib.contextmanager
def forced(tile: Tile) -> Iterator[None]:
    """Let the operator take `tile` whatever the tables say."""
    operator: Any = triton_operator
    before = operator.tile_for
    operator.tile_for = lambda shape, tokens, device: tile
    try:
        yield
    finally:
        operator.tile_for = before


def _write(
    context: Context, linears: Iterable[Linear], widths: Iterable[int], tokens: tuple[int, ...]
) -> None:
    """The table of this GPU: into the results and, from a GPU, where servers look."""
    found = dict(_ladders(context.cells, linears, widths, tokens))
    if not found:
        return
    device = context.device
    places = [context.folder]
    if device.is_gpu and not context.smoke:
        places.append(KERNELS / "linear" / "triton" / "tuned")
    for folder in places:
        name = f"tiles_{device.folder}.json" if folder == context.folder else ""
        path = folder / (name or tile_tables.file_name(device.name))
        before = _known(path)
        tile_tables.save_table(path, device.name, {**before, **found})


def _known(path: Path) -> dict[LinearShape, tile_tables.Ladder]:
    return tile_tables.load_table(path) if path.is_file() else {}


def _ladders(
    cells: Cells, linears: Iterable[Linear], widths: Iterable[int], tokens: tuple[int, ...]
) -> Iterator[tuple[LinearShape, list[tuple[int, Tile]]]]:
    records = cells.records()
    for linear in linears:
        for bits in widths:
            keys = [_key(linear, bits, m) for m in tokens]
            if all(key in records for key in keys):
                tiles = [Tile(**records[key]["tile"]) for key in keys]
                yield _shape(linear, bits), list(zip(tokens, tiles, strict=True))


def table(cells: Cells) -> str:
    """Markdown: each cell's tile beside the default."""
    lines = [
        "| linear | tile | us | default | us | speedup | tried |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, cell in cells.records().items():
        tiles = [" ".join(map(str, cell[name].values())) for name in ("tile", "default")]
        gain = cell["default_us"] / cell["us"]
        lines.append(
            f"| {key} | {tiles[0]} | {cell['us']:.1f} | {tiles[1]} | {cell['default_us']:.1f} | "
            f"{gain:.2f} | {cell['tried']} |"
        )
    lines += ["", *cells.troubles()]
    return "\n".join(["Tiles: tokens x outputs x inputs, warps, stages.", "", *lines])

"""Part `serve` without an engine: turns, child processes that reply or die, tables, GGUF files."""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.common.served_variants import find_variant
from benchmarks.common.shapes import MODELS
from benchmarks.cpu import peers
from benchmarks.cpu.serve import child_process, llama_engine, llama_file
from benchmarks.cpu.serve import measure as serve
from benchmarks.cpu.serve import table as serve_table
from benchmarks.cpu.serve.child import use_all_cores
from benchmarks.cpu.serve.variants import DEFAULT_VARIANTS, VARIANTS

OPTIONS = argparse.Namespace(
    model="TinyLlama-1.1B", layers=None, prefill=512, decode=64, rounds=2, no_amx=False
)
CHILD = """
import sys
from benchmarks.cpu.serve.child_process import reply, requests
print("noise")
reply({"facts": 1})
for request in requests():
    if request == "die":
        raise RuntimeError("as it was told")
    if request == "sleep":
        import time
        time.sleep(60)
    reply({"received": request})
"""


@pytest.fixture
def child(tmp_path: Path) -> child_process.ChildProcess:
    (tmp_path / "replying.py").write_text(CHILD)
    environment = {**os.environ, "PYTHONPATH": child_process.python_path(tmp_path, serve.ROOT)}
    return child_process.ChildProcess("replying", [], environment, tmp_path / "logs" / "child.log")


def test_a_child_replies_and_ends(child: child_process.ChildProcess, tmp_path: Path) -> None:
    assert child.receive(60) == {"facts": 1}
    assert child.request("1 2 3", 60) == {"received": "1 2 3"}
    child.close()
    assert child.process.returncode == 0
    assert "noise" in (tmp_path / "logs" / "child.log").read_text()


def test_a_dead_child_says_why(child: child_process.ChildProcess) -> None:
    child.receive(60)
    with pytest.raises(child_process.DiedError, match="RuntimeError: as it was told"):
        child.request("die", 60)
    with pytest.raises(child_process.DiedError, match="exit status 1"):
        child.request("anything", 60)
    child.close()


def test_a_child_that_takes_too_long_is_ended(child: child_process.ChildProcess) -> None:
    child.receive(60)
    with pytest.raises(child_process.DiedError, match="exit status -9"):
        child.request("sleep", 0.2)
    child.close()


class FakeVariant:
    """A running variant whose phases all take the seconds listed for its name."""

    order: list[str] = []  # noqa: RUF012

    def __init__(self, name: str, *others: object) -> None:
        self.name, self.facts = name, {"engine": name, "cache_bytes": 0}
        self.seconds = {"mergequant": 1.0, "vllm-float32": 2.0, "vllm-bfloat16": 40.0}[name]
        self.closed = False

    def round(self, options: argparse.Namespace) -> dict[str, float]:
        FakeVariant.order.append(self.name)
        return dict.fromkeys(serve.phases(options), self.seconds)

    def close(self) -> None:
        FakeVariant.order.append(f"{self.name} closed")


def test_two_variants_run_in_turns_and_a_slow_one_in_one_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve, "RunningVariant", FakeVariant)
    monkeypatch.setattr(FakeVariant, "order", [])
    variants = ["mergequant", "vllm-float32", "vllm-bfloat16", "llama.cpp-q4_0"]
    given = argparse.Namespace(**vars(OPTIONS), variants=variants, peers=None)
    counts: list[int] = []
    serve.run(given, "avx2", 1, Path("/nowhere"), lambda rows: counts.append(len(rows)))
    one, two = "mergequant", "vllm-float32"
    assert FakeVariant.order[:5] == [one, two, two, one, f"{two} closed"]
    assert FakeVariant.order[5:] == [one, "vllm-bfloat16", "vllm-bfloat16 closed", f"{one} closed"]
    assert counts == [1, 2, 3]
    given.variants = ["mergequant", "unknown"]
    with pytest.raises(ValueError, match="unknown: choose from mergequant"):
        serve.run(given, "avx2", 1, Path("/nowhere"), lambda rows: None)


def row(name: str, ours: float, theirs: float) -> dict[str, Any]:
    """Decoding takes `ours` or `theirs` seconds, first tokens and prefill 1 s."""

    def rounds(seconds: float) -> list[dict[str, float]]:
        return [
            {phase: 1.0 + seconds * phase.startswith("decode") for phase in serve.phases(OPTIONS)}
        ] * 2

    def facts(resident: int) -> dict[str, object]:
        return {"engine": "x", "resident": resident * 2**20, "cache_bytes": 2**20}

    mine = {"name": "mergequant", "facts": facts(1600), "rounds": rounds(ours)}
    others = {"facts": facts(3696 + 500 + 1 + 600), "rounds": rounds(theirs)}
    return {"name": name, "ours": mine, "theirs": others}


def test_speeds_take_the_first_token_off() -> None:
    speeds = serve_table.speeds(row("vllm-float32", 2.0, 4.0)["ours"]["rounds"], OPTIONS)
    assert speeds["prefill"] == [512.0] * 2
    assert speeds["decode, batch 1"] == [32.0] * 2 and speeds["decode, batch 8"] == [256.0] * 2


def test_the_tables_show_speedups_memory_and_failures() -> None:
    refused = {"name": "llama.cpp-q4_0", "ours": {}, "refused": "no folder"}
    rows = [row("vllm-float32", 2.0, 4.0), row("vllm-bfloat16", 2.0, 1.0), refused]
    text = serve_table.table(rows, OPTIONS)
    assert "| vllm-float32 | 512.00 | 16.00 | 128.00 | 2 | x |" in text
    assert "| vllm-bfloat16 | 1.00 (1.00-1.00) | 0.50 (0.50-0.50) | 0.50 (0.50-0.50) |" in text
    assert "- REFUSED llama.cpp-q4_0: no folder" in text
    # TinyLlama: 22 blocks of 44040192 weights and two tables of 32000 x 2048.
    parts = serve_table.expected_bytes(VARIANTS["mergequant-head16"], MODELS["TinyLlama-1.1B"], 22)
    assert parts == {"weights": 22 * 44040192 / 2, "embedding and head": 2 * 32000 * 2048 * 4}
    assert "| mergequant | 1600 | 1126 | +42.2% | 462 | 312 | 1 | 350 |" in text
    assert "| vllm-float32 | 4797 | 4547 | +5.5% | 3696 | 500 | 1 | 350 |" in text
    eight = serve_table.expected_bytes(VARIANTS["mergequant"], MODELS["TinyLlama-1.1B"], 22)
    assert eight["embedding and head"] == 32000 * 2048 * 5
    tied = serve_table.expected_bytes(VARIANTS["mergequant-head16"], MODELS["Qwen3-0.6B"], 1)
    assert tied["embedding and head"] == 151936 * 1024 * 4


def test_the_bound_is_bandwidth_over_what_a_token_reads() -> None:
    # 462 MiB of 4-bit weights and a head of 62.5 MiB: 550 MB; 5.5 GB/s read them ten times.
    model = MODELS["TinyLlama-1.1B"]
    size = 22 * 44040192 / 2 + 32000 * 2048
    assert serve_table.read_bytes(VARIANTS["mergequant"], model, 22) == size
    one = {**row("vllm-float32", 2.0, 4.0), "bandwidth": 64 * size}
    text = serve_table.table([one], OPTIONS)
    assert "| mergequant | 524 | 64.0 | 50% |" in text  # it decodes 32 tokens a second
    assert "reached" not in serve_table.table([row("vllm-float32", 2.0, 4.0)], OPTIONS)


def test_every_variant_is_known_to_its_engine() -> None:
    assert set(DEFAULT_VARIANTS) <= set(VARIANTS)
    for variant in VARIANTS.values():
        assert variant.file in ("Q4_0", "Q8_0", "F32") if variant.served is None else True
        assert variant.peer in ("", *peers.PEERS)
        if variant.served is not None:
            find_variant(variant.served)


@pytest.mark.parametrize(
    ("form", "weights", "size", "at"),
    [("Q4_0", 32, 18, 0), ("Q8_0", 32, 34, 0), ("Q6_K", 256, 210, 208)],
)
def test_blocks_of_llama_have_their_size_and_their_step(
    form: str, weights: int, size: int, at: int
) -> None:
    rows = llama_file.random_rows(form, 3, 512, np.random.default_rng(0))
    assert rows.dtype == np.uint8
    blocks = rows.reshape(3, 512 // weights, size)
    steps = blocks[..., at : at + 2].copy().view(np.float16)
    assert (steps == steps[0, 0, 0]).all() and steps[0, 0, 0] > 0


def test_a_file_of_llama_has_the_models_tensors() -> None:
    model = MODELS["TinyLlama-1.1B"]
    shapes = {name: (n, k) for name, n, k in llama_file.tensors(model, 2)}
    assert len(shapes) == 3 + 2 * 9
    assert shapes["blk.1.attn_k.weight"] == (256, 2048)
    assert shapes["blk.0.ffn_down.weight"] == (2048, 5632)
    linears = sum(n * k for name, (n, k) in shapes.items() if name.startswith("blk.0") and n > 1)
    assert linears == sum(linear.n * linear.k for linear in model.linears())
    assert llama_file.head_form(2048) == "Q6_K" and llama_file.head_form(128) == "Q8_0"
    with pytest.raises(ValueError, match="Q6_K needs K a multiple of 256"):
        llama_file.random_rows("Q6_K", 1, 128, np.random.default_rng(0))


def test_a_llama_of_newer_instructions_is_refused() -> None:
    newer = "CPU : AVX2 = 1 | AVX512 = 1 | AMX_INT8 = 1 |"
    llama_engine.refuse_newer(newer, "avx512-vnni", amx=True)
    with pytest.raises(RuntimeError, match="built for AMX"):
        llama_engine.refuse_newer(newer, "avx512-vnni", amx=False)
    with pytest.raises(RuntimeError, match="built for AVX512"):
        llama_engine.refuse_newer(newer, "avx2", amx=True)
    llama_engine.refuse_newer("CPU : AVX2 = 1 | F16C = 1 |", "avx2", amx=False)


def test_a_child_counts_all_cores_that_its_threads_are_bound_to() -> None:
    """The parent is bound to its first core as soon as OpenMP is loaded."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        use_all_cores(" ".join(map(str, sorted(before))))
        assert os.sched_getaffinity(0) == before
        use_all_cores("")
        assert os.sched_getaffinity(0) == before
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("size", [259, 300, 70_000])
def test_a_vocabulary_has_as_many_different_tokens_as_the_model(size: int) -> None:
    class Writer:
        def __init__(self) -> None:
            self.given: dict[str, Any] = {}

        def __getattr__(self, name: str) -> Any:
            return lambda value: self.given.__setitem__(name, value)

    writer = Writer()
    llama_file.add_vocabulary(writer, size)
    tokens = writer.given["add_token_list"]
    assert len(set(tokens)) == size == len(writer.given["add_token_types"])
    assert all(merge.replace(" ", "") in tokens for merge in writer.given["add_token_merges"])
    with pytest.raises(ValueError, match="259 tokens, not 256"):
        llama_file.add_vocabulary(writer, 256)

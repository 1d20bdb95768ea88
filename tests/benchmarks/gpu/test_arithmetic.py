"""Goals, ratios, searches and checks of the GPU benchmarks, on made-up figures."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.device import find_device
from benchmarks.common.goals import Goal, worst
from benchmarks.common.result_cells import Cells
from benchmarks.common.served_variants import VARIANTS, find_variant, write_checkpoint
from benchmarks.common.shapes import MODELS, Linear, distinct
from benchmarks.gpu.context import Context
from benchmarks.gpu.exact.error_bounds import Product, check
from benchmarks.gpu.gemm import table as gemm_table
from benchmarks.gpu.gemm.measure import cost
from benchmarks.gpu.plots import draw_all
from benchmarks.gpu.quantize import table as quantize_table
from benchmarks.gpu.serve import table as serve_table
from benchmarks.gpu.serve.child import speeds
from benchmarks.gpu.trace import measure as trace_measure
from benchmarks.gpu.trace import table as trace_table
from benchmarks.gpu.trace.measure import per_block
from mergequant_vllm.format import parse
from mergequant_vllm.kernels.linear.reference import ReferenceLinear
from mergequant_vllm.kernels.linear.spec import LinearSpec, StoredLinear
from mergequant_vllm.packing import pack


def make_cells(folder: Path, records: dict[str, dict[str, Any]]) -> Cells:
    cells = Cells(folder / "x.json", {}, "s", time.time() + 60, again=False, run="1")
    for key, record in records.items():
        cells.put(key, record)
    return cells


def test_a_goal_is_reached_missed_or_not_measured() -> None:
    assert Goal("a", 2.0, 2.0).reached and not Goal("a", 2.0, 1.9).reached
    assert Goal("a", 2.0, 2.0, most=True).reached and not Goal("a", 2.0, 2.1, most=True).reached
    assert Goal("a", 2.0, None).reached is None
    assert (
        "NOT reached" in Goal("a", 2.0, 1.0).line() and "not measured" in Goal("a", 2, None).line()
    )
    goal = worst("a", 2.0, {"x": 3.0, "y": 1.0, "z": 2.0})
    assert goal.measured == 1.0 and goal.detail == "worst: y; 2 of 3 reach it"
    assert worst("a", 2.0, {"x": 3.0, "y": 1.0}, most=True).measured == 3.0
    assert worst("a", 2.0, {}).reached is None


def gemm_cell(m: int, times: dict[str, float]) -> dict[str, Any]:
    linear = Linear("o", 1000, 2000, True)
    subjects = {
        name: {"us": us, "low": us, "high": us, "timer": "graph", **cost(name, linear, m)}
        for name, us in times.items()
    }
    return {"n": 1000, "k": 2000, "m": m, "dynamic": True, "subjects": subjects}


def test_gemm_figures_and_goals(tmp_path: Path) -> None:
    limits = {"bandwidth": 1e12, "bf16": 1e15, "int8": 2e15, "fp8": None, "from": {}}
    decode = gemm_cell(1, {"torch bf16": 8.0, "triton": 4.0, "marlin-int8": 1.25})
    prefill = gemm_cell(2048, {"vllm cutlass W8A8 INT8": 19.0, "triton": 20.0})
    cells = make_cells(tmp_path, {"limits": limits, "o M=1": decode, "o M=2048": prefill})
    row = gemm_table.derive(cells.done["o M=1"], limits)["marlin-int8"]
    assert row["torch bf16"] == pytest.approx(8 / 1.25)
    assert row["weights_of_bandwidth"] == pytest.approx(0.8)  # 1e6 bytes at 1e12 bytes/s: 1 us
    assert row["gbs"] == pytest.approx((1e6 + 2000 + 2000) / 1.25e-6 / 1e9)
    assert row["tops"] == pytest.approx(2 * 2e6 / 1.25e-6 / 1e12)
    share, speed = gemm_table.goals(cells)
    assert share.measured == pytest.approx(0.8) and share.reached and "marlin-int8" in share.detail
    assert speed.measured == pytest.approx(0.95) and speed.reached
    table = gemm_table.table(cells)
    assert "copy 1000 GB/s" in table and "| 1 | marlin-int8 (1) | 6.40 |" in table


def test_quantize_goals(tmp_path: Path) -> None:
    us = {
        "compiled norm": 2.0,
        "compiled norm + static": 2.1,
        "compiled norm + dynamic": 6.3,
        "plain torch dynamic": 60.0,
        "plain torch reconstruct": 24.0,
    }
    cell = {
        "m": 1,
        "k": 64,
        "subjects": {name: {"us": x, "low": x, "high": x} for name, x in us.items()},
    }
    goals = quantize_table.goals(make_cells(tmp_path, {"M=1 K=64": cell}))
    assert [goal.reached for goal in goals] == [False, True, None, None, False]
    assert goals[1].measured == pytest.approx(3.0) and goals[4].measured == pytest.approx(2.5)
    assert "70 (1 x 1)" in quantize_table.table(make_cells(tmp_path, {"M=1 K=64": cell}))


def serve_cell(batch: int, prefill: float, whole: float, gib: float) -> dict[str, Any]:
    return {
        **speeds(batch, 2048, 256, [prefill] * 3, [whole] * 3),
        "kernels": {"qkv_proj": "k"},
        "model_bytes": int(gib * 2**30),
        "peak_bytes": int(2 * gib * 2**30),
        "peak_without_cache_bytes": int(gib * 2**30),
        "cache_bytes_per_token": 2**19,
    }


def test_serve_speeds_and_goals(tmp_path: Path) -> None:
    cell = serve_cell(8, 1.0, 3.0, 1.0)
    assert cell["prefill_tokens_per_second"] == 8 * 2048
    assert cell["decode_tokens_per_second"] == 8 * 255 / 2
    records = {
        "bf16 batch=1": serve_cell(1, 1.0, 6.0, 13.0),
        "mergequant batch=1": serve_cell(1, 0.5, 2.5, 3.5),
        "marlin-w4a16 batch=1": serve_cell(1, 1.0, 2.9, 3.5),
    }
    goals = serve_table.goals(make_cells(tmp_path, records))
    by_name = {goal.text.partition(": ")[2]: goal for goal in goals}
    assert by_name["prefill speedup over bf16"].measured == pytest.approx(2.0)
    assert by_name["decode speedup over bf16 at batch 1"].measured == pytest.approx(2.5)
    assert by_name["end to end speedup over bf16, the largest as in the paper"].measured == 2.4
    memory = by_name["peak memory at batch 1 and sequence 2048, times below bf16"]
    one = 2049 * 2**19 / 2**30
    assert memory.measured == pytest.approx((13 + one) / (3.5 + one)) and not memory.reached
    assert by_name["decode speed over marlin-w4a16, batch 1 to 8"].measured == pytest.approx(0.95)
    assert by_name["decode speed over marlin-w4a16, batch 32 on"].reached is None
    assert by_name["prefill speed over marlin-w4a16"].reached
    assert "2.305x" in serve_table.table(make_cells(tmp_path, records))


@pytest.mark.parametrize(
    ("fails", "asked"),
    [((), [[2, 4]]), ((4,), [[2, 4], [4]]), ((2, 4), [[2, 4]])],
)
def test_a_depth_that_fails_after_another_is_traced_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: tuple[int, ...], asked: list[list[int]]
) -> None:
    began: list[list[int]] = []

    def run_child(module: str, words: list[str], on_cell: Any, left: float, log: Path) -> Any:
        assert Path(*module.split(".")).with_suffix(".py").exists()
        blocks = [int(x) for x in words[words.index("--blocks") + 1 :] if x.isdigit()]
        began.append(blocks)
        for depth in blocks:
            if depth in fails and (depth == blocks[0]) == (depth == fails[0] == 2):
                return "no memory"
            record = {"steps": 1, "kernels": {}, "prefill": {"a": depth}, "all": {"a": 2 * depth}}
            on_cell(str(depth), record)
        return None

    monkeypatch.setattr(trace_measure, "run_child", run_child)
    context = Context(find_device(), make_cells(tmp_path, {}), True, tmp_path)
    if 2 in fails:
        with pytest.raises(RuntimeError, match="no memory"):
            trace_measure._trace(context, "mergequant", "eager")
    else:
        record = trace_measure._trace(context, "mergequant", "eager")
        assert record["prefill"] == {"a": 1.0}
    assert began == asked


def test_kernels_a_block_are_half_the_difference(tmp_path: Path) -> None:
    shallow = {"steps": 8, "kernels": {}, "prefill": {"a": 5, "b": 2}, "all": {"a": 45, "b": 18}}
    deep = {
        "steps": 8,
        "kernels": {"o": "k"},
        "prefill": {"a": 9, "b": 2},
        "all": {"a": 97, "b": 18},
    }
    cell = per_block(shallow, deep)
    assert cell["prefill"] == {"a": 2.0} and cell["decode"] == {"a": 3.0}
    assert "| x | 3 | 2 | k |" in trace_table.table(make_cells(tmp_path, {"x": cell}))


def make_product(kernel_changes: float, **changes: Any) -> Product:
    spec = LinearSpec(64, 8, 4, 4, changes.get("token_step") is not None, "cpu", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 8, (8, 64), generator=generator, dtype=torch.int8)
    codes = torch.randint(-8, 8, (3, 64), generator=generator, dtype=torch.int8)
    stored = StoredLinear(pack(weight, 4), torch.full((8, 1), 2.0**-7), bias=torch.ones(8))
    add_bias = bool(changes.get("add_bias"))
    step = changes.get("token_step")
    expected = ReferenceLinear().prepare(stored, spec)(codes, step, None, add_bias)
    result = expected.clone()
    result[1, 2] *= 1 + kernel_changes
    return Product(spec, stored, codes, step, add_bias, expected, result)


def test_error_bounds_of_equality_and_of_small_errors() -> None:
    step = torch.full((3, 1), 0.37)
    for kernel in ("triton", "marlin-int8", "cutlass-int8", "reference"):
        assert check(kernel, make_product(0.0)) is None
        fault = check(kernel, make_product(2.0**-7))
        assert fault is not None and "first at [1, 2]" in fault
    ulp = {"token_step": step, "add_bias": True}
    # One unit in the last place is within Marlin's error bound with a bias; 1% is not.
    assert check("marlin-int8", make_product(2.0**-8, **ulp)) is None
    assert check("triton", make_product(2.0**-7, **ulp)) is not None
    assert check("marlin-int8", make_product(2.0**-5, **ulp)) is not None
    assert check("cutlass-int8", make_product(2.0**-5, **ulp)) is not None


def test_shapes_of_the_models() -> None:
    sizes = {model: [linear[1:3] for linear in MODELS[model].linears()] for model in MODELS}
    assert sizes["Llama-2-7B"] == [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]
    assert sizes["Llama-3-8B"] == [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
    assert sizes["Llama-2-70B"] == [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)]
    assert sizes["Qwen3-0.6B"] == [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]
    assert len(distinct(("Llama-2-7B", "Llama-3-8B"))) == 7


@pytest.mark.parametrize("name", [*VARIANTS, "mergequant:triton", "bf16+fp8-cache"])
def test_checkpoints_without_tensors(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, name, MODELS["Llama-3-8B"], 4, 2048)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 4 and config["vocab_size"] == 128256
    if name.startswith("mergequant"):
        linears = parse(config["quantization_config"]).block_linears(3)
        assert linears["self_attn.k_proj"].shape == (1024, 4096)
        fully = name.endswith("-static")
        assert (linears["mlp.down_proj"].static is None) != fully
        assert len(linears) == 7


def test_variants_are_looked_up_by_name() -> None:
    assert find_variant("mergequant:triton")[1] == "triton"
    assert find_variant("bf16+fp8-cache")[0].engine == {"kv_cache_dtype": "fp8"}
    for unknown in ("gptq", "bf16:triton"):
        with pytest.raises(ValueError, match="choose from bf16"):
            find_variant(unknown)


def test_engine_results_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    trace = {"prefill": {"a": 2.0}, "decode": {"a": 3.0}, "kernels": {}}
    serve = {
        f"{name} batch={b}": serve_cell(b, 1, 3, 1) for name in ("bf16", "fp8") for b in (1, 8)
    }
    for part, records in (("trace", {"bf16 eager": trace}), ("serve", serve)):
        head = {"part": part, "device": "a GPU"}
        path = tmp_path / "a_GPU" / f"{part}.json"
        path.parent.mkdir(exist_ok=True)
        cells = Cells(path, head, "s", time.time() + 60, again=False, run="1")
        for key, record in records.items():
            cells.put(key, record)
    drawn = sorted(path.name for path in draw_all(tmp_path))
    names = ("serve-decode", "serve-end-to-end", "serve-prefill", "trace-kernels")
    assert drawn == [f"{name}.png" for name in names]

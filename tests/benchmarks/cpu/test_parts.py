"""The command of the CPU benchmarks, its instruction sets, and groups of a profile."""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cpu import __main__ as command
from benchmarks.cpu import instruction_sets, run_part
from benchmarks.cpu.profile import measure as profile
from benchmarks.cpu.profile import table as profile_table


def test_avx2_restricts_every_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    variables = instruction_sets.environment("avx2", 2, [4, 5, 6], amx=True)
    names = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
    assert [variables[name].lower() for name in (*names, instruction_sets.OURS)] == ["avx2"] * 4
    assert (variables["OMP_NUM_THREADS"], variables["GOMP_CPU_AFFINITY"]) == ("2", "4 5")
    free = instruction_sets.environment("avx512-vnni", 1, [0], amx=True)
    assert "ONEDNN_MAX_CPU_ISA" not in free and free[instruction_sets.OURS] == "avx512-vnni"
    assert (
        instruction_sets.environment(None, 1, [0], amx=False)["ONEDNN_MAX_CPU_ISA"]
        == "AVX512_CORE_FP16"
    )


@pytest.mark.parametrize(
    ("isa", "amx", "hidden"),
    [("avx2", True, 5), ("avx512-vnni", False, 2), ("avx512-vnni", True, 0), (None, True, 0)],
)
def test_vllm_sees_no_more_than_the_instruction_set(
    monkeypatch: pytest.MonkeyPatch, isa: str | None, amx: bool, hidden: int
) -> None:
    beyond = ("amx_tile", "amx_fp16", "avx512", "avx512_bf16", "vnni", "avx2")
    names = [f"_is_{name}_supported" for name in beyond]
    for name in names:
        monkeypatch.setattr(torch.cpu, name, lambda: True, raising=False)
    instruction_sets.hide_newer(isa, amx=amx)
    assert [getattr(torch.cpu, name)() for name in names].count(False) == hidden
    assert torch.cpu._is_avx2_supported()


def test_files_are_named_after_the_instruction_set() -> None:
    assert run_part.file_name("linear", "avx2", 2, amx=True) == "linear-avx2-2t"
    assert run_part.file_name("serve", "avx512-vnni", 1, amx=False) == "serve-avx512-vnni-noamx-1t"


def test_nothing_is_timed_while_the_tests_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def run(words: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
        ran.append(words)
        assert given["env"][instruction_sets.OURS] == "avx2"
        return subprocess.CompletedProcess(words, len(ran) == 1, stdout="1 failed")

    monkeypatch.setattr(command.os, "sched_setaffinity", lambda process, cores: None)
    monkeypatch.setattr(command.subprocess, "run", run)
    assert command.main(["linear", "--threads", "1", "--isa", "avx2"]) == 1
    assert "The kernels' tests fail: nothing is timed." in capsys.readouterr().err
    assert len(ran) == 1 and ran[0][-2:] == command.TESTS
    assert command.main(["linear", "--threads", "1", "--isa", "avx2"]) == 0
    assert ran[2][-1] == "--worker"


def test_more_threads_than_cores_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["serve", "--threads", "100000"]) == command.REFUSED
    assert "this process may use" in capsys.readouterr().err


def test_a_missing_library_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "mergequant_vllm.kernels.native_library.refusal", lambda: "there is no compiler"
    )
    assert command.main(["profile", "--threads", "1", "--worker"]) == command.REFUSED
    printed = capsys.readouterr().err
    assert printed == "The native kernels do not run here: there is no compiler.\n"


@dataclass
class Event:
    """What `profile` reads of PyTorch's events."""

    name: str
    self_cpu_time_total: float = 0.0
    cpu_parent: "Event | None" = None


def test_time_belongs_to_the_nearest_group() -> None:
    graph = Event("## Call CompiledFxGraph None ##", 5e6)
    linear = Event("mergequant::integer_linear_cpu", 7e6, graph)
    attention = Event("vllm::unified_attention_with_output", 1e6, graph)
    events = [
        graph,
        linear,
        Event("aten::empty", 1e6, linear),
        attention,
        Event("_C::cpu_attention_with_kv_cache", 2e6, attention),
        Event("graph_0_cpp_fused_add_integer_linear_cpu_mean_mul_round_rsqrt_0", 3e6, graph),
        Event("graph_0_cpp_fused_mul_silu_slice_3", 1e6, graph),
        Event("mergequant::token_quant_native", 1e6, graph),
        Event("aten::mm", 4e6, graph),
        Event("_C::onednn_mm", 2e6),
        Event("aten::argmax", 1e6, Event("_C::greedy_argmax")),
    ]
    assert profile.by_group(events) == {
        profile.CALLS: 5.0,
        profile.LINEARS: 12.0,
        profile.ATTENTION: 3.0,
        profile.NORMS: 3.0,
        profile.ELEMENTWISE: 1.0,
        profile.TOKENS: 1.0,
        profile.HEAD: 2.0,
        profile.OPERATORS: 1.0,
    }


def test_a_profile_is_of_one_token() -> None:
    def measured(linears: float, head: float) -> dict[str, object]:
        groups = {profile.LINEARS: linears, profile.HEAD: head}
        return {"seconds": linears, "profiled": linears + head, "groups": groups}

    rows = [profile._row("prefill", 1, measured(0.5, 0.5), None)]
    rows.append(profile._row("decoding", 4, measured(0.5, 0.25), measured(0.25, 0.125)))
    assert rows[1]["groups"] == {profile.LINEARS: 0.0625, profile.HEAD: 0.03125}
    text = profile_table.table(rows)
    assert f"| {profile.LINEARS} | 500.00 | 50.0% | 62.50 | 66.7% |" in text
    assert "| without the profiler | 500.00 |  | 62.50 |  |" in text
    assert profile.EMBEDDING not in text.split("\n| |")[1]


def test_the_tests_that_must_pass_before_anything_is_timed_exist() -> None:
    from benchmarks.cpu.__main__ import TESTS

    assert all((Path(__file__).parents[3] / file).is_file() for file in TESTS)

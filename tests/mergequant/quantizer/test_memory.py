"""The formula of needed memory: its terms by hand, what it depends on, and a run that stays below.

The hand-computed terms are written out with the shapes of one small Llama.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mergequant import Options, quantize
from mergequant.errors import InputError
from mergequant.model.architectures import ARCHITECTURES, find
from mergequant.quantizer.memory import needed
from mergequant.quantizer.memory.available import free_host_bytes, refuse_if_short
from mergequant.quantizer.memory.needed import (
    BATCH,
    BLOCK,
    FACTOR,
    HIDDEN,
    INPUTS,
    LIBRARIES,
    MATRICES,
    TRAINED_FACTOR,
    TRAINING,
    MemoryNeed,
    needed_memory,
)
from tests.conftest import SMALL, WHOLE
from tests.tiny import make_model

GIB = 2**30
CONFIG: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "dtype": "bfloat16",
}
ELEMENTS = 4 * 64 * 64 + 3 * 64 * 192  # q, k, v, o; gate, up, down
LLAMA = find("llama")
ON_CPU = SMALL.model_copy(update={"device": "cpu", "equalization": False})


def need(
    options: Options = ON_CPU, windows: int = 8, length: int = 16, **config: Any
) -> MemoryNeed:
    return needed_memory(LLAMA, {**CONFIG, **config}, options, windows, length)


def test_terms_of_a_small_block_by_hand() -> None:
    found = need()
    read = 2 * ELEMENTS  # bfloat16
    packed = 2 * ELEMENTS // 2
    ids = 8 * 8 * 16
    packing = 3 * 4 * 64 * 192
    assert found.parts == {
        HIDDEN: 8 * 16 * 64 * 4,
        BLOCK: 5 * ELEMENTS,
        INPUTS: 4 * 4 * 16 * 192,  # of down, four windows
        MATRICES: FACTOR * 4 * 192 * 192,
        "host: a block's tensors": read + packed + ids + packing,
        "host: libraries": LIBRARIES,
    }
    assert found.together == found.device + found.host - packing
    scaled = need(ON_CPU.model_copy(update={"equalization": True}))  # what is scaled is float32
    assert scaled.host - found.host == 2 * ELEMENTS


def test_a_batch_of_short_windows_by_hand() -> None:
    found = need(windows=512)  # 256 of them are 4096 tokens
    assert found.parts[MATRICES] == FACTOR * 4 * 192 * 192 // 2
    assert found.parts[BATCH] == 8 * 4096 * (64 + 2 * 192)  # gate and up
    groups = need(ON_CPU.model_copy(update={"group_size": 32}), windows=512)
    assert groups.parts[BATCH] - found.parts[BATCH] == 4 * 4096 * 2 * 192  # gate's or up's
    carried = {"activations": "fully_static", "static_bits": 4}
    static = need(ON_CPU.model_copy(update=carried), windows=512)
    assert static.parts[BATCH] == groups.parts[BATCH] - 4 * 4096 * 2 * (192 - 64)  # down's alone


def test_an_input_that_is_kept_twice_by_hand() -> None:
    online = need(ON_CPU.model_copy(update={"rotation": "online"}))
    assert online.parts[INPUTS] == 2 * 4 * 4 * 16 * 192
    pilot = ON_CPU.model_copy(update={"reconstruction": "pad", "max_extra_channels": 0.25})
    assert need(pilot, intermediate_size=128).parts[INPUTS] == 2 * 4 * 4 * 16 * 80


def test_sums_that_float32_cannot_hold_by_hand() -> None:
    update = {"weight_bits": 8, "dynamic_bits": 8}
    eight = ON_CPU.model_copy(update=update)
    assert need(eight, intermediate_size=1024).parts[BLOCK] == 5 * (4 * 64 * 64 + 3 * 64 * 1024)
    assert need(eight, intermediate_size=1088).parts[BLOCK] == 9 * (4 * 64 * 64 + 3 * 64 * 1088)
    one = {"overrides": {"re:.*down_proj": update}}
    assert need(ON_CPU.model_copy(update=one), intermediate_size=1088).parts == (
        need(eight, intermediate_size=1088).parts
    )


def test_compensation_adds_two_streams_and_what_it_keeps_of_each_linear() -> None:
    options = ON_CPU.model_copy(update={"compensation_rank": 4, "compensation_samples": 8})
    found = need(options)
    assert found.parts[HIDDEN] == 3 * 8 * 16 * 64 * 4
    assert found.parts[BLOCK] == 10 * ELEMENTS
    two = need(options.model_copy(update={"compensation_samples": 2}))
    assert two.parts[HIDDEN] == (8 + 2 * 2) * 16 * 64 * 4


def test_training_a_wide_batch_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needed, "TOKENS_A_STEP", 2048)
    options = ON_CPU.model_copy(
        update={
            "compensation": "low_rank",
            "compensation_rank": 4,
            "compensation_samples": 512,
        }
    )
    found = need(options, windows=512)  # 128 windows are a step of 2048 tokens
    factors = 4 * (4 * (64 + 64) + 3 * (64 + 192))
    assert found.parts[TRAINING] == TRAINED_FACTOR * 4 * (ELEMENTS + factors)
    touched = (64 + 3 * 64) + (64 + 64) + (64 + 2 * 192) + (192 + 64)
    assert found.parts[BATCH] == 8 * 2048 * touched
    elementwise = need(options.model_copy(update={"compensation": "elementwise"}), windows=512)
    assert elementwise.parts[TRAINING] == TRAINED_FACTOR * 4 * 2 * ELEMENTS


@pytest.mark.parametrize(
    ("rotation", "bytes_an_element"),
    [
        ("none", 6),  # embedding and head, and a mask or codes of each
        ("offline", 12),  # and both in float32
    ],
)
def test_a_wide_vocabulary_by_hand(rotation: str, bytes_an_element: int) -> None:
    found = need(ON_CPU.model_copy(update={"rotation": rotation}), vocab_size=2**20)
    rows = 4 * 8 * 8192 * 64
    assert found.parts["host: embedding and head"] == bytes_an_element * 2**20 * 64 + rows


def test_parts_add_up() -> None:
    for update in ({}, {"rotation": "online"}, {"activations": "dynamic"}, {"group_size": 32}):
        for rank in (0, 4):
            for mode in ("none", "auto"):
                fields = {**update, "compensation_rank": rank, "reconstruction": mode}
                found = need(Options(**{**ON_CPU.model_dump(), **fields}))
                assert sum(found.parts.values()) == found.device + found.host
                assert max(found.device, found.host) < found.together <= found.device + found.host


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_the_number_of_blocks_does_not_matter(model_type: str) -> None:
    shallow, deep = (
        needed_memory(find(model_type), {**CONFIG, "num_hidden_layers": x}, Options(), 256, 2048)
        for x in (2, 200)
    )
    assert shallow == deep


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [
        ({}, {"hidden_size": 128, "num_attention_heads": 4}),
        ({}, {"intermediate_size": 256}),
        ({"num_key_value_heads": 1}, {}),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({"vocab_size": 10_000}, {"vocab_size": 20_000}),
        ({"dtype": "float32"}, {"dtype": None}),
    ],
)
def test_a_larger_model_never_needs_less(smaller: dict[str, Any], larger: dict[str, Any]) -> None:
    plain = Options(rotation="none", equalization=False)
    for options in (ON_CPU, plain.model_copy(update={"device": "cpu"}), plain):
        a, b = need(options, **smaller), need(options, **larger)
        assert a.device <= b.device and a.host <= b.host and a.together <= b.together
        assert (a.device, a.host) != (b.device, b.host) or larger == {"dtype": None}


@pytest.mark.parametrize(
    "more",
    [
        {"compensation_rank": 8},
        {"reconstruction": "pad", "max_extra_channels": 0.5},
        {"group_size": 32},
        {"group_size": 32, "asymmetric": True},
        {"rotation": "online"},
        {"weight_bits": 8, "static_bits": 8},
        {"statistics_samples": 8},
    ],
)
def test_a_longer_method_never_needs_less(more: dict[str, Any]) -> None:
    assert need().device <= need(ON_CPU.model_copy(update=more)).device


def test_more_and_longer_windows_need_more() -> None:
    assert need(windows=8).device < need(windows=9).device
    assert need(length=16).device < need(length=17).device


def test_attention_scores_are_counted_for_grouped_queries_on_a_gpu_alone() -> None:
    many = {"num_key_value_heads": 2, "num_attention_heads": 4, "hidden_size": 128}
    gpu, cpu = (
        need(ON_CPU.model_copy(update={"device": x}), windows=4, length=4096, **many)
        for x in ("cuda", "cpu")
    )
    scores = 12 * 4 * 4096 * 4096  # of a batch, which is one window
    assert cpu.device < scores < gpu.device
    plain = {**many, "num_key_value_heads": 4}
    assert need(windows=4, length=4096, **plain).device < scores


def bytes_of_tensors(run: Callable[[], object], trace: Path) -> int:
    """The most that PyTorch's allocator held during `run`, what operations take inside included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    seen.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


@pytest.mark.parametrize("rotation", ["none", "online"])
@pytest.mark.parametrize("options", [SMALL, WHOLE])
def test_a_run_stays_below_what_was_predicted(
    tmp_path: Path, text: Path, options: Options, rotation: str
) -> None:
    model = make_model(tmp_path / "model", hidden=128, heads=4, kv_heads=2, intermediate=384)
    few = {"device": "cpu", "clip_points": 3, "weight_search": "minmax"}
    options = options.model_copy(update={**few, "rotation": rotation})
    config = json.loads((model / "config.json").read_text())
    predicted = needed_memory(LLAMA, config, options, 8, options.sequence_length).together
    found = bytes_of_tensors(
        lambda: quantize(model, tmp_path / "out", [text], options, progress=False),
        tmp_path / "trace.json",
    )
    assert found < predicted - LIBRARIES
    # A bound is of use only if it is near.
    assert found > (predicted - LIBRARIES) / 1.5


def test_a_need_that_nothing_can_hold_is_refused_with_a_remedy() -> None:
    parts = {HIDDEN: 2**59, BLOCK: 5, INPUTS: 6, "host: libraries": 7}
    huge = MemoryNeed(device=2**59 + 11, host=7, together=2**59 + 18, parts=parts)
    with pytest.raises(InputError) as refusal:
        refuse_if_short(huge, torch.device("cpu"))
    said = str(refusal.value)
    assert "536870912.0 GiB of memory, most of it" in said and "for hidden states" in said
    assert "lower --gptq-samples and --compensation-samples, or --sequence-length" in said
    many = MemoryNeed(2**59, 7, 2**59, {HIDDEN: 5, BLOCK: 5, INPUTS: 2**59, "host: libraries": 7})
    with pytest.raises(InputError, match="lower --statistics-samples or --sequence-length"):
        refuse_if_short(many, torch.device("cpu"))
    wide = MemoryNeed(2**59, 7, 2**59, {HIDDEN: 5, BLOCK: 2**59, INPUTS: 5, "host: libraries": 7})
    with pytest.raises(InputError, match="too wide for it"):
        refuse_if_short(wide, torch.device("cpu"))
    refuse_if_short(need(), torch.device("cpu"))


def test_a_gpu_is_asked_for_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:1")
    asked = []

    def told(of: torch.device) -> tuple[int, int]:
        asked.append(of)
        return 3 * GIB, 4 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", told)
    parts = {HIDDEN: GIB, BLOCK: GIB, INPUTS: 3 * GIB, "host: libraries": 7}
    with pytest.raises(InputError, match=r"5\.0 GiB of memory of cuda:1.* 3\.0 GiB are free"):
        refuse_if_short(MemoryNeed(5 * GIB, 7, 5 * GIB + 7, parts), device)
    refuse_if_short(MemoryNeed(3 * GIB, 7, 2**60, parts), device)
    with pytest.raises(InputError, match="of host memory beside cuda:1"):
        refuse_if_short(MemoryNeed(3 * GIB, 2**59, 2**60, parts), device)
    assert asked == [device] * 3


def files(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_free_memory_is_the_systems_or_the_control_groups(tmp_path: Path) -> None:
    assert free_host_bytes(tmp_path) is None
    system = {"proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:    4000 kB\n"}
    assert free_host_bytes(files(tmp_path, system)) == 4000 * 1024
    group = "sys/fs/cgroup/a/b"
    second = {
        "proc/self/cgroup": "0::/a/b\n",
        f"{group}/memory.max": "3000\n",
        f"{group}/memory.current": "1000\n",
        f"{group}/memory.stat": "anon 900\ninactive_file 100\n",
        "sys/fs/cgroup/a/memory.max": "max\n",
        "sys/fs/cgroup/a/memory.current": "5000\n",
    }
    assert free_host_bytes(files(tmp_path, second)) == 3000 - 1000 + 100
    above = {"sys/fs/cgroup/a/memory.max": "5500\n"}
    assert free_host_bytes(files(tmp_path, above)) == 500


def test_free_memory_of_the_first_version_of_control_groups(tmp_path: Path) -> None:
    contents = {
        "proc/meminfo": "MemAvailable: 4000 kB\n",
        "proc/self/cgroup": "5:cpu:/x\n4:memory:/inside\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "500\n",
    }
    assert free_host_bytes(files(tmp_path, contents)) == 1500

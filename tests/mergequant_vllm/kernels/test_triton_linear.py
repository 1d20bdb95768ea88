"""The Triton kernel equals the reference: on a GPU where there is one, else interpreted.

The kernel calls no function that Triton itself jits, so it can be interpreted in a process that
imported Triton before TRITON_INTERPRET was set; no subprocess is needed.
"""

import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergequant_vllm.kernels.int4_linear.reference import ReferenceLinear
from mergequant_vllm.kernels.int4_linear.spec import LinearSpec
from mergequant_vllm.kernels.int4_linear.triton import (
    LARGEST_TILE,
    TILES,
    Tile,
    TritonLinear,
    build_kernel,
    choose_tile,
    compile_options,
    int4_linear,
)
from mergequant_vllm.packing import pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = TritonLinear()

# (N, K): 1, primes, around the tiles; K ends inside a word in all but the last.
SIZES = [(1, 1), (7, 43), (43, 7), (129, 127), (172, 129), (352, 172), (43, 352)]


@pytest.fixture
def kernel_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without a GPU, the kernel is built for the interpreter and forgotten after the test."""
    if DEVICE == "cpu":
        pytest.importorskip("triton", reason="Triton is not installed")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    build_kernel.cache_clear()
    yield
    build_kernel.cache_clear()


def make_spec(**changes: object) -> LinearSpec:
    fields: dict[str, object] = {
        "in_features": 352,
        "out_features": 128,
        "weight_bits": 4,
        "activation_bits": 4,
        "dynamic": False,
        "device": "cuda",
        "dtype": torch.bfloat16,
    }
    return LinearSpec(**{**fields, **changes})  # type: ignore[arg-type]


def random_codes(*shape: int) -> Tensor:
    """int8 in [-8, 7]."""
    return torch.randint(-8, 8, shape, dtype=torch.int8)


def assert_equals_reference(
    codes: Tensor,
    weight_codes: Tensor,
    weight_step: Tensor,
    token_step: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`codes` int8 [..., K] and `weight_codes` int8 [N, K], all on the CPU; returns [..., N]."""
    expected = ReferenceLinear().linear(
        codes, weight_codes, weight_step, token_step, bias, out_dtype
    )
    weight = KERNEL.prepare(pack(weight_codes, 4).to(DEVICE), make_spec())
    result = KERNEL.linear(
        codes.to(DEVICE),
        weight,
        weight_step.to(DEVICE),
        None if token_step is None else token_step.to(DEVICE),
        None if bias is None else bias.to(DEVICE),
        out_dtype,
    ).cpu()
    assert result.dtype == out_dtype
    assert torch.equal(result, expected)
    return result


@pytest.mark.usefixtures("kernel_runs")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 64, 127, 128, 129])
def test_sizes(tokens: int, size: tuple[int, int]) -> None:
    torch.manual_seed(tokens)
    N, K = size
    assert_equals_reference(
        random_codes(tokens, K),
        random_codes(N, K),
        torch.rand(N) * 0.01,
        torch.rand(tokens, 1),
        torch.randn(N),
        torch.float32,
    )


@pytest.mark.usefixtures("kernel_runs")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_epilogue(dynamic: bool, bias_dtype: torch.dtype | None, out_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, N, K = 7, 129, 172
    assert_equals_reference(
        random_codes(tokens, K),
        random_codes(N, K),
        torch.rand(N) * 0.01,
        torch.rand(tokens, 1) if dynamic else None,
        None if bias_dtype is None else torch.randn(N).to(bias_dtype),
        out_dtype,
    )


@pytest.mark.usefixtures("kernel_runs")
@pytest.mark.parametrize("tokens", [1, 129])
@pytest.mark.parametrize("pair", [(-8, -8), (7, 7), (-8, 7), (7, -8), (-128, -8)], ids=str)
def test_extreme_codes(pair: tuple[int, int], tokens: int) -> None:
    """Longest sums; -128 is what 8-bit activations would bring."""
    N, K = 43, 351
    result = assert_equals_reference(
        torch.full((tokens, K), pair[0], dtype=torch.int8),
        torch.full((N, K), pair[1], dtype=torch.int8),
        torch.ones(N),
        None,
        None,
        torch.float32,
    )
    assert torch.equal(result, torch.full((tokens, N), float(pair[0] * pair[1] * K)))


@pytest.mark.usefixtures("kernel_runs")
def test_leading_dimensions_and_strides() -> None:
    """Codes [2, 3, K] and steps [2, 3, 1], both cut out of wider tensors."""
    torch.manual_seed(0)
    assert_equals_reference(
        random_codes(2, 3, 64)[..., 5:48],
        random_codes(7, 43),
        torch.rand(7),
        torch.rand(2, 3, 4)[..., :1],
        None,
        torch.float32,
    )


def operator_arguments(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        random_codes(tokens, 43).to(DEVICE),
        pack(random_codes(7, 43), 4).to(DEVICE),
        torch.rand(7, device=DEVICE),
        torch.rand(tokens, 1, device=DEVICE),
        torch.randn(7, device=DEVICE),
    )


@pytest.mark.usefixtures("kernel_runs")
def test_operator_is_registered_soundly() -> None:
    """Schema, fake implementation and dynamic shapes, by PyTorch's own check."""
    codes, weight, weight_step, token_step, bias = operator_arguments(5)
    for optional in ((token_step, bias), (None, None)):
        arguments = (codes, weight, weight_step, *optional, torch.bfloat16)
        torch.library.opcheck(int4_linear, arguments)


@pytest.mark.usefixtures("kernel_runs")
def test_one_graph_for_all_lengths() -> None:
    """A full-graph compile sees one opaque operator, whatever the number of tokens."""
    graphs: list[torch.fx.GraphModule] = []

    def keep_graph(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(KERNEL.linear, fullgraph=True, dynamic=True, backend=keep_graph)
    for tokens in (2, 5, 65):
        arguments = (*operator_arguments(tokens), torch.float32)
        assert torch.equal(compiled(*arguments), KERNEL.linear(*arguments))
    calls = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1
    assert [str(node.target) for node in calls] == ["mergequant.int4_linear_triton.default"]


def test_tiles_grow_with_tokens() -> None:
    chosen = [choose_tile(tokens).block_m for tokens in (0, 1, 16, 17, 64, 65, 10**6)]
    assert chosen == [16, 16, 16, 64, 64, 128, 128]


@pytest.mark.parametrize("tile", [*(tile for _, tile in TILES), LARGEST_TILE], ids=str)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_for_gpus(capability: int, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code, without a GPU: int8 tensor cores, no fused multiply-add, small enough."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    build_kernel.cache_clear()
    pointers = {"codes": "*i8", "weight": "*i32", "weight_step": "*fp32", "token_step": "*fp32"}
    outputs = {"bias": "*bf16", "out": "*bf16"}
    sizes = {"M": "i32", "N": "i32", "K": "i32"}
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    kernel = build_kernel()
    signature = {**pointers, **outputs, **sizes, **dict.fromkeys(blocks, "constexpr")}
    aligned = [*pointers, *outputs, "N", "K"]
    source = ASTSource(
        kernel,
        signature,
        constexprs=blocks,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = compile_kernel(source, target=target, options=compile_options(tile))
    build_kernel.cache_clear()
    assert re.search(r"mma.*(\.s8\.s8|kind::i8)", compiled.asm["ptx"])
    assert "fma." not in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 * 1024  # a block's most on capabilities 8.6 and 8.9


def test_refuses_other_widths() -> None:
    reason = KERNEL.refusal(make_spec(weight_bits=3))
    assert reason == "it reads 4-bit weights and the layer has 3 bits"


def test_refuses_the_cpu_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = KERNEL.refusal(make_spec(device="cpu"))
    assert reason == "it runs on GPUs (or with TRITON_INTERPRET=1) and the layer is on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert KERNEL.refusal(make_spec(device="cpu")) is None


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (12, 0)], ids=str)
def test_refuses_old_gpus(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    refused = "it needs compute capability 8.0 and the GPU has 7.5"
    assert KERNEL.refusal(make_spec()) == (refused if capability == (7, 5) else None)


@pytest.mark.parametrize("stub", [None, types.ModuleType("triton")], ids=["absent", "stub"])
def test_refuses_without_triton(
    stub: types.ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", stub)
    monkeypatch.delitem(sys.modules, "triton.language", raising=False)
    reason = KERNEL.refusal(make_spec())
    assert reason is not None
    assert reason.startswith("Triton cannot be imported (")


def test_module_loads_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; "
        "from mergequant_vllm.kernels.int4_linear.triton import TritonLinear; TritonLinear()"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)

"""Part `quantize`: what quantizing activations costs beside the norm (the paper's Table 6).

`compiled`: one function for torch.compile, as in a compiled server. `eager`: separate kernels, as
with --enforce-eager; vLLM's norm. Both replayed from CUDA graphs. `plain`: the paper's comparison,
plain PyTorch operations on an input that is normed already, launching included.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.device import Device, runs_triton
from benchmarks.common.random_linears import generator_on
from benchmarks.common.result_cells import Record, Refused
from benchmarks.gpu.context import Context
from benchmarks.gpu.timing import ROUND_SECONDS, ROUNDS, Call, compare
from mergequant_vllm.kernels.codes import CodeLayout, CodeWriter
from mergequant_vllm.kernels.selection.quantizers import CodeForm, StaticQuantizer, TokenQuantizer
from mergequant_vllm.kernels.token_quant import reference as token_quant

# Large first: the compiler's choices are those for large batches, as a server's are.
TOKENS = (8192, 4096, 2048, 256, 128, 32, 16, 1)
HIDDEN = 4096
SMOKE_TOKENS, SMOKE_HIDDEN = (2, 1), 64
EPSILON = 1e-5
BITS = 4
INT8 = CodeLayout.INT8
HADAMARD = 256  # the largest power of two that divides Llama-2-7B's 11008, the input of down
PLAIN = ("plain torch dynamic", "plain torch reconstruct")

Step = Callable[[Tensor], object]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm in the order of operations of Hugging Face's Llama; x [M, K] in bfloat16."""
    z = x.to(torch.float32)
    z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + EPSILON)
    return z.to(x.dtype) * weight


def run(context: Context) -> None:
    """Measure every number of tokens that is not done."""
    hidden = SMOKE_HIDDEN if context.smoke else HIDDEN
    keys = {f"M={m} K={hidden}": m for m in (SMOKE_TOKENS if context.smoke else TOKENS)}
    steps = make_steps(context.device, hidden)
    for key in context.cells.pending(keys):
        context.measure(key, functools.partial(_cell, context, steps, key, keys[key], hidden))


def _cell(context: Context, steps: Mapping[str, Step], key: str, m: int, hidden: int) -> Record:
    device = context.device
    generator = generator_on(device, m)
    x = torch.randn(m, hidden, generator=generator, device=device.kind, dtype=torch.bfloat16)
    if m > 1:
        torch._dynamo.mark_dynamic(x, 0)  # one compiled function for every M but 1
    results = compare(
        {name: functools.partial(_one_call, step, x) for name, step in steps.items()},
        device,
        rounds=1 if context.smoke else ROUNDS,
        round_seconds=0 if context.smoke else ROUND_SECONDS,
        launches=frozenset(PLAIN),
        dead=context.cells.dead(key),
    )
    return {"m": m, "k": hidden, "subjects": results}


def _one_call(step: Step, x: Tensor) -> Sequence[Call]:
    return [functools.partial(step, x)]


def make_steps(device: Device, K: int) -> dict[str, Step]:
    """All that is compared, by name; each takes x [M, K] in bfloat16."""
    weight = torch.full((K,), 2.0, device=device.kind, dtype=torch.bfloat16)
    quantizers = make_quantizers(device, K)

    def vllm_norm(x: Tensor) -> Tensor:
        operations = _vllm(device)
        out = torch.empty_like(x)
        operations.rms_norm(out, x, weight, EPSILON)
        return out

    def then(first: Callable[[Tensor], Tensor], quantizer: nn.Module) -> Step:
        return lambda x: quantizer(first(x))

    def torch_norm(x: Tensor) -> Tensor:
        return norm(x, weight)

    compiled: dict[str, Step] = {"norm": torch_norm}
    eager: dict[str, Step] = {"norm": vllm_norm}
    for name, quantizer in quantizers.items():
        compiled[f"norm + {name}"] = then(torch_norm, quantizer)
        eager[f"norm + {name}"] = then(vllm_norm, quantizer)
    eager["norm + dynamic (vllm fused, 8 bits)"] = lambda x: _vllm(
        device
    ).rms_norm_dynamic_per_token_quant(x, weight, EPSILON, torch.int8)
    eager["norm + dynamic (vllm, 8 bits)"] = lambda x: _vllm(device).scaled_int8_quant(vllm_norm(x))
    return {
        **{f"compiled {name}": _compiled(step, device) for name, step in compiled.items()},
        **{f"eager {name}": step for name, step in eager.items()},
        **{f"eager {name} alone": quantizer for name, quantizer in quantizers.items()},
        **_plain(device, K),
    }


def make_quantizers(device: Device, K: int) -> dict[str, nn.Module]:
    """Make quantizers as a server has them in front of a kernel that takes int8 codes."""
    form = CodeForm(
        bits=BITS,
        layout=INT8,
        columns=K,
        writer=CodeWriter.GPU if runs_triton(device) else CodeWriter.REFERENCE,
    )
    generator, there = generator_on(device, 0), torch.device(device.kind)
    index = torch.randint(K, (K,), generator=generator, device=there, dtype=torch.int32)
    offset = torch.rand(K, generator=generator, device=there) - 0.5
    clip = torch.tensor([0.9], device=there)
    return {
        "static": StaticQuantizer(form, K, None, None, there),
        "static, gather, offset": StaticQuantizer(form, K, index, offset, there),
        "dynamic": TokenQuantizer(form, clip, None),
        "dynamic, Hadamard": TokenQuantizer(form, clip, min(HADAMARD, K)),
    }


def _compiled(step: Step, device: Device) -> Step:
    # On CPUs only traced, which is enough to try the program out.
    compiled: Step = torch.compile(step, backend="inductor" if device.is_gpu else "eager")
    return compiled


def _plain(device: Device, K: int) -> dict[str, Step]:
    """Table 6 as the paper has it: dynamic quantization against dimension reconstruction."""
    index = torch.randperm(K, generator=generator_on(device, 0), device=device.kind)
    clip = torch.tensor([0.9], device=device.kind)
    return {
        PLAIN[0]: lambda x: token_quant.token_codes(x, clip, BITS, INT8),
        PLAIN[1]: lambda x: x.index_select(-1, index),
    }


def _vllm(device: Device) -> Any:
    if not device.is_gpu:
        raise Refused(f"vLLM's kernel needs an NVIDIA GPU and this is {device.kind}")
    try:
        from vllm import _custom_ops
    except ImportError as error:
        raise Refused(f"vLLM cannot be imported ({error})") from error
    return _custom_ops

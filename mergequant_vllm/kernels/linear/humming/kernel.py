"""INT4 and INT8 linears on NVIDIA GPUs by humming-kernels, which vLLM for CUDA installs.

What the library takes and how it is spoken to: `library`.

Numerics: `humming.rounding`. By default one thread block sums each output, so that results equal
`rounding.emulate` and depend neither on the batch nor on the run. `stream_k` lets blocks
share an output, which keeps more of the GPU busy with few tokens and rounds their parts in 16 bits.

Compilation. The first call of a layer's shape compiles a kernel for each range of M that the
library's heuristics tell apart, and the first launch of each loads it; neither may happen while a
CUDA graph is captured, so `warm_up` does both after loading. Kernels are cached as files under
HUMMING_CACHE_DIR (~/.humming/cache) and compiled under a lock file each, so that processes may
start together; before 0.1.12 a kernel became visible only after its lock was released, therefore
tensor-parallel ranks take turns here.
"""

import importlib
import json
import logging
import time
from typing import Any

import torch
from filelock import FileLock
from packaging.version import Version
from torch import Tensor

from mergequant_vllm.kernels.capability import spell
from mergequant_vllm.kernels.codes import CodeLayout, CodeWriter, lay_out
from mergequant_vllm.kernels.linear import refusals
from mergequant_vllm.kernels.linear.humming.library import (
    code_bits,
    library,
    library_tensors,
    on_device,
    padded_columns,
    transform,
)
from mergequant_vllm.kernels.linear.humming.rounding import power_of_two
from mergequant_vllm.kernels.linear.spec import LinearSpec, PreparedLinear, StoredLinear
from mergequant_vllm.kernels.torch_operator import define_operator

OLDEST_CAPABILITY = 75
SMALLEST_GROUP = 32

logger = logging.getLogger("vllm.mergequant")

_OTHER = "use humming-int8"

_warm: set[tuple[str, str, torch.device]] = set()


def _launch(
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor,
    locks: Tensor | None,
    layer_config: str,
    compute_config: str,
    out_features: int,
) -> Tensor:
    """Launch the library's kernel; opaque to torch.compile.

    Args:
        codes: uint8 [..., columns / 2] or int8 [..., columns].
        weight: in the library's layout, as are weight_scale, zero_point and bias.
        weight_scale: float16 or bfloat16.
        zero_point: or None.
        bias: or None.
        input_scale: float32 [1] if the layer is static to the library, else [..., 1] or [1, 1].
        locks: int32 zeros for stream-K, 0 again after the call, or None.
        layer_config: the library's, JSON.
        compute_config: the library's, JSON.
        out_features: N.

    Returns:
        [..., N] in the dtype of `weight_scale`.
    """
    rows = codes.reshape(-1, codes.shape[-1]).contiguous()
    shape = (*codes.shape[:-1], out_features)
    if rows.shape[0] == 0:
        return weight_scale.new_empty(shape)
    if input_scale.dim() > 1:
        input_scale = input_scale.reshape(-1, 1).expand(rows.shape[0], 1).contiguous()
    y: Tensor = library("ops").humming_gemm(
        layer_config=layer_config,
        compute_config=compute_config,
        tuning_config=None,
        inputs=rows,
        weight=weight,
        weight_scale=weight_scale,
        zero_point=zero_point,
        bias=bias,
        input_scale=input_scale,
        locks=locks,
    )
    return y[:, :out_features].contiguous().reshape(shape)


def _fake(codes: Tensor, weight: Tensor, weight_scale: Tensor, *others: Any) -> Tensor:
    out_features: int = others[-1]
    return codes.new_empty((*codes.shape[:-1], out_features), dtype=weight_scale.dtype)


humming_linear = define_operator("humming", _launch, _fake)


class HummingPrepared(PreparedLinear):
    """A linear in the library's layout."""

    weight: Tensor
    weight_scale: Tensor
    zero_point: Tensor | None
    input_scale: Tensor
    locks: Tensor | None

    def __init__(
        self, stored: StoredLinear, spec: LinearSpec, layout: CodeLayout, stream_k: bool
    ) -> None:
        super().__init__()
        self.spec, self.layout = spec, layout
        self.columns = padded_columns(spec)
        shift = power_of_two(stored, spec)
        self.unit = 2.0**-shift
        constants = [stored.constant(add_bias) for add_bias in (True, False)]
        tensors = library_tensors(stored, spec, layout, shift, constants[0])
        self.layer_config, transformed = transform(tensors, spec, layout)
        compute = {"use_batch_invariant": not stream_k, "use_f16_accum": False}
        self.compute_config = json.dumps({**compute, "gemm_type": "dense"})
        for name in ("weight", "weight_scale", "zero_point"):
            self.register_buffer(name, transformed.get(name))
        bias = other = transformed.get("bias")
        # The kernel of a layer with a bias always adds one.
        if bias is not None and constants[1] is None:
            other = torch.zeros_like(bias)
        elif stored.bias is not None and constants[1] is not None:
            tensors = library_tensors(stored, spec, layout, shift, constants[1])
            other = transform(tensors, spec, layout)[1]["bias"]
        self.register_buffer("constant_with_bias", bias)
        self.register_buffer("constant_without_bias", other)
        device = stored.weight_packed.device
        static = json.loads(self.layer_config).get("input_quant_mode") == "static_tensor"
        # The dtype is spelled out: vLLM loads models under the model's default dtype.
        shape = (1,) if static else (1, 1)
        scale = torch.full(shape, self.unit, dtype=torch.float32, device=device)
        self.register_buffer("input_scale", scale)
        # Each layer its own: layers may run at the same time on different streams.
        self.register_buffer("locks", _locks(device) if stream_k else None)

    def forward(
        self, codes: Tensor, token_step: Tensor | None, token_zero: Tensor | None, add_bias: bool
    ) -> Tensor:
        """Compute `rounding.emulate`."""
        scale = self.input_scale if token_step is None else token_step
        if token_step is not None and self.unit != 1:
            scale = token_step * self.unit
        y: Tensor = humming_linear(
            codes,
            self.weight,
            self.weight_scale,
            self.zero_point,
            self.constant(add_bias),
            scale,
            self.locks,
            self.layer_config,
            self.compute_config,
            self.spec.out_features,
        )
        return y

    def warm_up(self) -> None:
        """Compile, load and launch each kernel that some number of tokens chooses, once a shape."""
        device = self.weight.device
        key = (self.layer_config, self.compute_config, device)
        if key in _warm:
            return
        start = time.monotonic()
        lock = library("utils.jit").get_humming_lock_filename("mergequant")
        with on_device(device):
            with FileLock(lock):
                kernels = library("kernel.humming").HummingKernel
                ranges = kernels.prepare_kernels(self.layer_config, self.compute_config, None)
            # The smallest number of tokens that chooses each kernel.
            tokens: dict[int, int] = {}
            for before, _, kernel, _ in ranges.view(-1, 4).tolist():
                tokens.setdefault(kernel, before + 1)
            for count in tokens.values():
                self._launch_zeros(count)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        _warm.add(key)
        logger.info(
            "humming: %d kernels for %d inputs and %d outputs ready after %.1f s",
            len(tokens),
            self.spec.in_features,
            self.spec.out_features,
            time.monotonic() - start,
        )

    def _launch_zeros(self, tokens: int) -> None:
        device = self.weight.device
        zeros = torch.zeros(tokens, self.columns, dtype=torch.int8, device=device)
        step = torch.ones(tokens, 1, dtype=torch.float32, device=device)
        codes = lay_out(zeros, self.layout, self.columns)
        self(codes, step if self.spec.dynamic else None, None, True)


def _locks(device: torch.device) -> Tensor:
    """Locks, as many as vLLM gives, and at least the 1024 of older versions."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return torch.zeros(max(1024, 8 * processors), dtype=torch.int32, device=device)


class _HummingLinear:
    """What the two kernels share.

    Args:
        stream_k: let thread blocks share outputs; see the module's docstring.
    """

    name: str
    layout: CodeLayout
    weight_widths: tuple[int, ...]
    activation_widths: tuple[int, ...]

    def __init__(self, stream_k: bool = False) -> None:
        self.stream_k = stream_k

    def refusal(self, spec: LinearSpec) -> str | None:
        """Refuses other devices, dtypes, forms and GPUs, and a missing library."""
        return (
            refusals.device(spec)
            or refusals.dtype(spec)
            or self._refuse_widths(spec)
            or refusals.token_zero_points(spec)
            or refusals.segments(spec)
            or (self._refuse_groups(spec) if spec.groups > 1 else None)
            or self._refuse_gpu(spec)
            or self._refuse_library(spec)
        )

    def prepare(self, stored: StoredLinear, spec: LinearSpec) -> PreparedLinear:
        """See the module's docstring; on a GPU also compiles."""
        prepared = HummingPrepared(stored, spec, self.layout, self.stream_k)
        if stored.weight_packed.is_cuda:
            prepared.warm_up()
        return prepared

    def _refuse_widths(self, spec: LinearSpec) -> str | None:
        if spec.weight_bits not in self.weight_widths:
            widths = " or ".join(str(width) for width in self.weight_widths)
            return f"it takes weights of {widths} bits and the layer has {spec.weight_bits} bits"
        if spec.activation_bits not in self.activation_widths:
            widths = " or ".join(str(width) for width in self.activation_widths)
            return f"it takes activations of {widths} bits and the layer has {spec.activation_bits}"
        if spec.zero_points and spec.weight_bits == code_bits(self.layout):
            return f"it takes no zero points with weights of {spec.weight_bits} bits"
        return None

    def _refuse_groups(self, spec: LinearSpec) -> str | None:
        raise NotImplementedError

    def _refuse_gpu(self, spec: LinearSpec) -> str | None:
        if spec.capability is None:
            return None
        reason = refusals.capability(spec.capability, OLDEST_CAPABILITY)
        if reason is not None:
            return reason
        spelled = spell(spec.capability)
        if spec.capability < 80 and spec.dtype is torch.bfloat16:
            return f"bfloat16 needs compute capability 8.0 (this is {spelled}); use --dtype float16"
        return self._refuse_capability(spec.capability)

    def _refuse_capability(self, capability: int) -> str | None:
        raise NotImplementedError

    def _refuse_library(self, spec: LinearSpec) -> str | None:
        try:
            module = importlib.import_module("humming")
        except (ImportError, OSError) as error:
            return f"humming-kernels cannot be imported ({error}); install vLLM for CUDA"
        needed, installed = self._needed_version(spec), getattr(module, "__version__", None)
        if installed is None:
            return f"the module humming of {module.__spec__} is not that of humming-kernels"
        if Version(installed) < Version(needed):
            return f"the layer or GPU needs humming-kernels {needed}, not {installed}; upgrade vLLM"
        return None

    def _needed_version(self, spec: LinearSpec) -> str:
        capability = spec.capability or 0
        turing = self.layout is CodeLayout.NIBBLES and 75 <= capability < 80
        if turing or (spec.zero_points and spec.groups == 1):
            return "0.1.17"
        return "0.1.14" if 110 <= capability < 120 else "0.1.10"


class HummingInt4Linear(_HummingLinear):
    """INT4 tensor cores: weights and activations of 4 bits, or weights of 3."""

    name = "humming-int4"
    layout = CodeLayout.NIBBLES
    writer = CodeWriter.GPU
    weight_widths = (3, 4)
    activation_widths = (4,)

    def _refuse_groups(self, spec: LinearSpec) -> str | None:
        return f"{refusals.groups(spec)}; {_OTHER}"

    def _refuse_capability(self, capability: int) -> str | None:
        if capability < 90:
            return None
        spelled = spell(capability)
        return f"INT4 tensor cores end at compute capability 8.9, this is {spelled}; {_OTHER}"


class HummingInt8Linear(_HummingLinear):
    """INT8 tensor cores: activations of 4 or 8 bits in int8, weights of 3, 4 or 8 in memory."""

    name = "humming-int8"
    layout = CodeLayout.INT8
    writer = CodeWriter.GPU
    weight_widths = (3, 4, 8)
    activation_widths = (4, 8)

    def _refuse_groups(self, spec: LinearSpec) -> str | None:
        size = spec.group_size
        if size is None or (size >= SMALLEST_GROUP and size & (size - 1) == 0):
            return None
        least = SMALLEST_GROUP
        return f"it takes groups of {least} or a higher power of two and the layer has {size}"

    def _refuse_capability(self, capability: int) -> str | None:
        if capability not in range(103, 110):
            return None
        return f"INT8 tensor cores are slow in compute capability {spell(capability)}; use triton"

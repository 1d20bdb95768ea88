"""What the tests of the Humming kernels, emulated and installed, go through."""

import torch
from torch import Tensor

from mergequant_vllm.kernels.codes import CodeLayout, nibble_order
from mergequant_vllm.kernels.linear.humming.kernel import HummingInt4Linear, HummingInt8Linear
from mergequant_vllm.kernels.linear.spec import LinearSpec
from tests.mergequant_vllm.kernels.made import make_spec

Kernel = HummingInt4Linear | HummingInt8Linear
INT4, INT8 = HummingInt4Linear(), HummingInt8Linear()
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def gpu_spec(**changes: object) -> LinearSpec:
    """A spec that both kernels serve, with other fields."""
    return make_spec(**{"device": "cuda", "dtype": torch.bfloat16, **changes})


FORMS: list[tuple[Kernel, dict[str, object]]] = [
    (INT4, {"weight_bits": 4}),
    (INT4, {"weight_bits": 3}),
    (INT4, {"weight_bits": 3, "zero_points": True}),
    (INT4, {"weight_bits": 4, "group_size": 512}),  # one group: a step per output channel
    (INT8, {"weight_bits": 4}),
    (INT8, {"weight_bits": 3, "activation_bits": 8}),
    (INT8, {"weight_bits": 8, "activation_bits": 8}),
    (INT8, {"weight_bits": 4, "zero_points": True}),
    (INT8, {"weight_bits": 4, "group_size": 32, "zero_points": True, "activation_bits": 8}),
    (INT8, {"weight_bits": 3, "group_size": 128}),
    (INT8, {"weight_bits": 8, "group_size": 128}),
]
IDS = [f"{k.name}-{'-'.join(f'{a[0]}{b}' for a, b in form.items())}" for k, form in FORMS]


def in_order(weight: Tensor, kernel: Kernel) -> Tensor:
    """Columns [N, columns] as the library counts them, in the order of the linear's channels."""
    if kernel.layout is not CodeLayout.NIBBLES:
        return weight
    order = nibble_order(weight.shape[1])
    return torch.empty_like(weight).index_copy_(1, order, weight)

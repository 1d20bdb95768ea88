"""The native module of a calibrated block equals the reference's, bit for bit, in every form."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mergequant.layers.native_linear import native_linear
from mergequant.layers.served_linear import served_linear
from mergequant_vllm.kernels import native_library
from mergequant_vllm.packing import unpack
from tests.forms import linear_form
from tests.mergequant_vllm.test_stored_forms import make_tensors

WEIGHTS: list[dict[str, Any]] = [
    {},
    {"weight_bits": 3, "zero_points": True},
    {"weight_bits": 8},
    {"group_size": 32},
    {"group_size": 32, "zero_points": True},
]
INPUTS: list[tuple[str, dict[str, Any]]] = [
    ("static", {"columns": 96, "offsets": True, "output_offset": "float32"}),
    ("dynamic", {"bias": True}),
    ("dynamic", {"hadamard": 32, "activation_bits": 8}),
    ("dynamic", {"heads": (3, 32), "input_zero_points": True}),
]


@pytest.mark.skipif(native_library.refusal() is not None, reason="no native kernels here")
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
@pytest.mark.parametrize("read", INPUTS, ids=str)
def test_it_equals_the_served_linear(
    weight: dict[str, Any], read: tuple[str, dict[str, Any]]
) -> None:
    form = linear_form((40, 96), read[0], **weight, **read[1])
    tensors = make_tensors(form, seed=3)
    if form.bias:
        tensors["bias"] = torch.rand(form.shape[0])
    codes = unpack(tensors["weight_packed"], form.weight.bits, form.in_features)
    native = native_linear(form, codes, tensors.__getitem__)
    assert native is not None
    x = torch.randn(2, 5, form.shape[1], generator=torch.Generator().manual_seed(5)) * 4
    expected: Tensor = served_linear(form, codes, tensors.__getitem__, torch.float32)(x)
    assert torch.equal(native(x), expected)


def test_another_device_is_left_to_the_reference() -> None:
    form = linear_form((40, 96), "static")
    codes = torch.zeros(40, 96, dtype=torch.int8, device="meta")
    assert native_linear(form, codes, {}.__getitem__) is None

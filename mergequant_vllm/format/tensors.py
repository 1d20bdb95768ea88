"""What a checkpoint's files must hold, and the comparison with what their headers say."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from mergequant_vllm.format.checkpoint import BLOCK, CheckpointFormat
from mergequant_vllm.format.linear import FormatError, LinearFormat
from mergequant_vllm.packing import words_per_row

_DTYPES: Final[dict[str, Literal["BF16", "F32"]]] = {"bfloat16": "BF16", "float32": "F32"}
_REMEDY: Final = "copy the checkpoint again, or quantize the model again."


@dataclass(frozen=True)
class StoredTensor:
    """Shape and safetensors dtype of a tensor on disk; `dtype` None admits any floating type."""

    shape: tuple[int, ...]
    dtype: Literal["I32", "I8", "BF16", "F32"] | None


def stored_tensors(linear: LinearFormat) -> dict[str, StoredTensor]:
    """The tensors of one quantized linear, by suffix."""
    out_features = linear.shape[0]
    words = words_per_row(linear.in_features, linear.weight.bits)
    tensors = {
        "weight_packed": StoredTensor((out_features, words), "I32"),
        "weight_scale": StoredTensor((out_features, linear.groups), "BF16"),
    }
    if linear.weight.zero_points:
        tensors["weight_zero_point"] = StoredTensor((out_features, linear.groups), "I8")
    if linear.bias:
        tensors["bias"] = StoredTensor((out_features,), None)
    if linear.output_offset is not None:
        tensors["output_offset"] = StoredTensor((out_features,), _DTYPES[linear.output_offset])
    return tensors | _input_tensors(linear)


def _input_tensors(linear: LinearFormat) -> dict[str, StoredTensor]:
    if linear.static is None:
        return {"input_clip": StoredTensor((1,), "F32")}
    tensors = {}
    if linear.static.columns is not None:
        tensors["input_index"] = StoredTensor((linear.static.columns,), "I32")
    if linear.static.offsets:
        tensors["input_offset"] = StoredTensor((linear.in_features,), "F32")
    return tensors


def expected_tensors(checkpoint: CheckpointFormat) -> dict[str, StoredTensor]:
    """Every tensor that the checkpoint's files must hold, by full name."""
    expected: dict[str, StoredTensor] = {}
    for name, entry in checkpoint.entries():
        linear = checkpoint.quantized.get(name)
        if linear is not None:
            stored = stored_tensors(linear)
        else:
            stored = {"weight": StoredTensor(entry.shape, None)}
            if entry.bias:
                stored["bias"] = StoredTensor(entry.shape[:1], None)
        expected |= {f"{name}.{suffix}": tensor for suffix, tensor in stored.items()}
    for pattern, shape in checkpoint.tensors.items():
        for number in range(checkpoint.blocks) if BLOCK in pattern else range(1):
            expected[pattern.replace(BLOCK, str(number))] = StoredTensor(tuple(shape), None)
    return expected


def check_tensors(checkpoint: CheckpointFormat, stored: Mapping[str, StoredTensor]) -> None:
    """Compare the tensors that the files' headers name with the contract.

    Raises:
        FormatError: names the first missing, extra, misshapen or mistyped tensor and the remedy.
    """
    expected = expected_tensors(checkpoint)
    missing = sorted(expected.keys() - stored.keys())
    if missing:
        raise FormatError(f"Tensor {missing[0]!r} is missing ({len(missing)} in all): {_REMEDY}")
    extra = sorted(stored.keys() - expected.keys())
    if extra:
        raise FormatError(
            f"Tensor {extra[0]!r} does not belong in the checkpoint ({len(extra)} in all): "
            f"{_REMEDY}"
        )
    for name, wanted in expected.items():
        given = stored[name]
        if given.shape != wanted.shape:
            raise FormatError(
                f"Tensor {name!r} has shape {list(given.shape)}, not {list(wanted.shape)}: "
                f"{_REMEDY}"
            )
        if wanted.dtype is not None and given.dtype != wanted.dtype:
            raise FormatError(
                f"Tensor {name!r} has dtype {given.dtype}, not {wanted.dtype}: {_REMEDY}"
            )

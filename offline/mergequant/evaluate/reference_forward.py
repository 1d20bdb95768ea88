"""The reference forward of a mergequant checkpoint: what the server is held against."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mergequant.errors import InputError
from mergequant.layers.served_linear import from_stored
from mergequant.model.architectures import find
from mergequant.model.hugging_face_config import load_config
from mergequant.model.reader import Reader, is_mergequant
from mergequant_vllm.format import LinearFormat, check_tensors, parse


def default_device() -> str:
    """Where the reference forward runs: on a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(
    folder: Path, dtype: torch.dtype = torch.float32, tensor_parallel_size: int = 1
) -> Any:
    """A model for `transformers`, 16-bit or mergequant.

    Args:
        dtype: of everything that is not quantized.
        tensor_parallel_size: of the server to be matched: o and down get a step per token and rank.

    Returns:
        a `PreTrainedModel` in evaluation mode.

    Raises:
        InputError: a model in 16 bits lacks weights.
    """
    reader = Reader(folder)
    if not is_mergequant(reader.config):
        return _load_plain(folder, dtype)
    return _load_quantized(reader, dtype, tensor_parallel_size)


def _load_plain(folder: Path, dtype: torch.dtype) -> Any:
    model: Any
    model, loading = AutoModelForCausalLM.from_pretrained(
        str(folder),
        config=load_config(folder),
        dtype=dtype,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers fills them with random numbers
        raise InputError(
            f"Model {folder} lacks {len(missing)} weights that a {model.config.model_type} has "
            f"({missing[0]}): download it again, or correct model_type in its config.json."
        )
    return model.eval()


def _load_quantized(reader: Reader, dtype: torch.dtype, ranks: int) -> Any:
    checkpoint = parse(reader.config["quantization_config"])
    check_tensors(checkpoint, reader.headers)
    config = load_config(reader.folder)
    del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    quantized = checkpoint.quantized
    architecture = find(reader.config["model_type"])
    for name, linear in quantized.items():
        parent, _, child = architecture.in_transformers(name).rpartition(".")
        module = served_module(reader, name, linear, dtype, ranks)
        setattr(model.get_submodule(parent), child, module)
    others = {
        architecture.in_transformers(name): reader.read(name).to(dtype)
        for name in reader.headers
        if name.rpartition(".")[0] not in quantized
    }
    model.load_state_dict(others, strict=False)
    model.tie_weights()
    return model.eval()


def served_module(
    reader: Reader, name: str, linear: LinearFormat, dtype: torch.dtype, ranks: int = 1
) -> nn.Module:
    """The module of one quantized linear of a checkpoint, see `load_model`."""

    def read(suffix: str) -> Tensor:
        return reader.read(f"{name}.{suffix}")

    row_parallel = find(reader.config["model_type"]).is_row_parallel(name)
    return from_stored(linear, read, dtype, ranks if row_parallel else 1)

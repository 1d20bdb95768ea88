"""A damaged checkpoint never gets as far as an engine."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mergequant.evaluate.perplexity import vllm_engine

pytestmark = pytest.mark.engine


def test_a_missing_tensor_stops_the_engine_with_one_sentence(
    tmp_path: Path, checkpoint: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    file = folder / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.o_proj.weight_scale"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"self_attn.o_proj.weight_scale' is missing .*copy the"):
        vllm_engine(folder, enforce_eager=True)

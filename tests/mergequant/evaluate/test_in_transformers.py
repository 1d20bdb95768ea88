"""transformers answers rightly for a checkpoint, or refuses, once mergequant is imported."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from mergequant import quantize
from mergequant.evaluate import in_transformers
from mergequant.evaluate.reference_forward import load_model
from mergequant.layers.served_linear import ServedLinear
from mergequant_vllm.format import QUANT_METHOD, FormatError, parse
from tests.conftest import SMALL
from tests.tiny import make_model

IDS = torch.arange(5, 30)[None]
IMPORTS = {
    "mergequant first": "import mergequant\nfrom transformers import AutoModelForCausalLM",
    "transformers first": "import transformers.quantizers.auto\n"
    "from transformers import AutoModelForCausalLM\nimport mergequant",
    "only a part": "from transformers import AutoModelForCausalLM\nimport mergequant.errors",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_computes_what_the_reference_forward_does(
    checkpoint: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    assert isinstance(model.model.layers[0].mlp.down_proj, ServedLinear)
    assert torch.equal(model(IDS).logits, load_model(checkpoint, dtype)(IDS).logits)
    assert "UNEXPECTED" not in caplog.text and "MISSING" not in caplog.text
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 28)


@pytest.mark.parametrize("model_type", ["gpt_neox", "opt", "bloom", "phi", "phi3", "gemma2"])
def test_other_types_too(
    tmp_path: Path, text: Path, model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_model(tmp_path / "source", model_type)
    folder = quantize(source, tmp_path / "out", [text], SMALL, progress=False)
    # transformers itself leaves Gemma 2's cap on scores out unless attention is eager.
    attention = "eager" if model_type == "gemma2" else None
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    served = [x for x in model.modules() if isinstance(x, ServedLinear)]
    assert len(served) == len(parse(model.config.quantization_config.to_dict()).quantized)
    assert torch.equal(model(IDS).logits, load_model(folder)(IDS).logits)
    assert "UNEXPECTED" not in caplog.text and "MISSING" not in caplog.text


def test_what_is_loaded_is_not_saved_again(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")


def test_a_damaged_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model-00001-of-00003.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.down_proj.weight_scale"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(FormatError, match=r"down_proj.weight_scale' is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("order", IMPORTS)
def test_the_order_of_imports_does_not_matter(checkpoint: Path, order: str) -> None:
    code = f"{IMPORTS[order]}\nmodel = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})\n"
    code += "print(type(model.model.layers[0].mlp.down_proj).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["ServedLinear"], done.stderr[-1000:]


def test_the_format_has_one_name() -> None:
    assert in_transformers.METHOD == QUANT_METHOD in AUTO_QUANTIZER_MAPPING
    in_transformers.register()  # once is enough, twice no harm

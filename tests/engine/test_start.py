"""The second start of an engine reads what the first one compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.engine

SCRIPT = """
import json, sys
from pathlib import Path
from torch._dynamo.utils import counters
from mergequant.evaluate.perplexity import vllm_engine

if __name__ == "__main__":
    given = {"quantization": "mergequant", "dtype": "float32", "max_model_len": 64}
    with vllm_engine(Path(sys.argv[1]), **given):
        print("COUNTED " + json.dumps(counters["inductor"]))
"""


def start(folder: Path, cache: Path) -> dict[str, int]:
    """What PyTorch's compiler counts in a new process that starts an engine."""
    own = {
        name: str(cache / name.lower()) for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR")
    }
    environment = os.environ | own | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment.pop("VLLM_USE_AOT_COMPILE", None)
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (line,) = (x for x in done.stdout.splitlines() if x.startswith("COUNTED "))
    counted: dict[str, int] = json.loads(line.removeprefix("COUNTED "))
    return counted


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU vLLM reads its own cache")
def test_the_second_start_compiles_nothing(served: Path, tmp_path: Path) -> None:
    first, second = start(served, tmp_path), start(served, tmp_path)
    assert first["fxgraph_cache_miss"] > 0
    assert second.get("fxgraph_cache_miss", 0) == 0
    assert second["fxgraph_cache_hit"] > 0

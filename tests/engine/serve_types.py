"""Serves several checkpoints in this one process, each eagerly and compiled: seconds, not minutes.

Usage: serve_types.py WINDOWS OUTPUT FOLDER...: log-probabilities of the windows' tokens by
checkpoint, `NAME.eager` and `NAME.compiled`, in one safetensors file. vLLM changes classes of
transformers where it serves a model by them, so the reference is computed in another process.
"""

import gc
import os
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def main(windows_file: str, output: str, *folders: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from mergequant.evaluate.perplexity import prompt_logprobs

    windows, found = load_file(windows_file)["windows"], {}
    for folder in folders:
        for mode in ("eager", "compiled"):
            engine = LLM(
                folder,
                quantization="mergequant",
                dtype="float32",
                enforce_eager=mode == "eager",
                max_model_len=256,
                tensor_parallel_size=1,
            )
            found[f"{Path(folder).name}.{mode}"] = prompt_logprobs(engine, windows)
            engine.llm_engine.engine_core.shutdown()
            del engine
            gc.collect()
            cleanup_dist_env_and_memory()
    save_file(found, output)


if __name__ == "__main__":
    main(*sys.argv[1:])

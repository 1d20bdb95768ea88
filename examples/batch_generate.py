"""Generate for a batch of prompts, offline, with a quantized checkpoint.

python examples/batch_generate.py CHECKPOINT [PROMPT ...]
"""

import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; read on machines without a GPU

from vllm import LLM, SamplingParams

PROMPTS = ("The statement", "A function is", "Objects of this type", "If the name")


def main(checkpoint: str, *prompts: str) -> None:
    llm = LLM(checkpoint)  # config.json says quant_method: mergequant; no flag is needed
    sampling = SamplingParams(temperature=0.0, max_tokens=32)
    for output in llm.generate(list(prompts or PROMPTS), sampling):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


# vLLM starts processes that import this file again.
if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])

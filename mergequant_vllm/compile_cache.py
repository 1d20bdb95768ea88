"""vLLM's cache of compiled models on a CPU: the one that its second start can read.

Ahead-of-time compilation, which vLLM turns on with PyTorch 2.10 and later, saves on a CPU what it
cannot load again ("'function' object has no attribute 'finalize_loading'"), so that each start
compiles anew. Without it the compiler's own cache is read, and a second start compiles nothing.
"""

import os

from vllm.logger import init_logger
from vllm.platforms import current_platform

SWITCH = "VLLM_USE_AOT_COMPILE"
logger = init_logger("vllm.mergequant")


def read_compiled_again() -> None:
    """Switch ahead-of-time compilation off on a CPU, unless its variable is set.

    Processes that vLLM starts later inherit it.
    """
    if current_platform.is_cpu() and SWITCH not in os.environ:
        os.environ[SWITCH] = "0"
        logger.info("%s=0, so that the next start finds the compiled model", SWITCH)

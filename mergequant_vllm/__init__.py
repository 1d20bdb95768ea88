"""MergeQuant checkpoints in vLLM: a plugin, found through entry point group `vllm.general_plugins`.

Importing this package touches neither vLLM nor CUDA; `register` does, inside vLLM's own processes.
"""

__version__ = "0.1.0"


def register() -> None:
    """Make vLLM know `quant_method: mergequant`. Called by vLLM in each process; idempotent.

    With an unsupported vLLM one warning is logged and other models are served as before; loading
    a mergequant checkpoint is then refused with the same sentence.
    """
    import logging

    from mergequant_vllm.version import unsupported_vllm

    refusal = unsupported_vllm()
    if refusal is not None:
        logging.getLogger("vllm.mergequant").warning(refusal)

    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from mergequant_vllm.config import MergeQuantConfig
    except ImportError:
        # An exception here would stop vLLM from serving any model at all.
        if refusal is None:
            raise
        return
    register_quantization_config("mergequant")(MergeQuantConfig)

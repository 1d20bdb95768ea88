"""Child of AutoRound: a preset scheme, trained rounding for as many steps as the options say."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.method.peers.child import answer


def quantize(folder: Path, windows: Tensor, options: dict[str, Any]) -> tuple[Any, Any]:
    """Quantize all linear layers of the blocks, in float32."""
    from auto_round import AutoRound  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    told = {key: value for key, value in options.items() if key != "checkout"}
    rounding = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        dataset=list(windows[:, None]),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        device_map="cpu",
        enable_torch_compile=False,
        amp=False,
        **told,
    )
    quantized, _ = rounding.quantize()
    quantized = quantized.to(torch.float32)
    layers = [module for module in quantized.modules() if hasattr(module, "act_quant_func")]

    @contextmanager
    def exact_activations() -> Iterator[None]:
        kept = [module.act_quant_func for module in layers]
        for module in layers:
            module.act_quant_func = lambda x, **_: (x, None, None)
        yield
        for module, function in zip(layers, kept, strict=True):
            module.act_quant_func = function

    return quantized, exact_activations if "A16" not in options["scheme"] else None


if __name__ == "__main__":
    answer(quantize)

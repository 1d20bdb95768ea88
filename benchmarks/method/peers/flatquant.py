"""Child of FlatQuant: its trained transformations and clips, by the functions of its checkout.

Nothing of the checkout is changed. Without a GPU, `Tensor.cuda` and `torch.cuda.synchronize` do
nothing; training is in float32.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.method.peers.child import answer

# Its own script for 4 bits, without the cache's; the name only passes its list of known models.
SCRIPT = (
    "--model ./modelzoo/meta-llama/Llama-3.1-8B --w_bits 4 --a_bits 4 --flat_lr 5e-3 --lwc --lac "
    "--cali_trans --add_diag --deactive_amp"
)


def quantize(folder: Path, windows: Tensor, options: dict[str, Any]) -> tuple[Any, Any]:
    """Train transformations and clips block by block, then round the weights to nearest."""
    sys.path.insert(0, options["checkout"])
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
        torch.cuda.synchronize = lambda *_: None
    from flatquant import (  # type: ignore[import-not-found]
        args_utils,
        flat_utils,
        quant_utils,
        train_utils,
        utils,
    )
    from flatquant.model_tools.llama31_utils import (  # type: ignore[import-not-found]
        apply_flatquant_to_llama_31,
    )
    from gptq_utils import rtn_fwrd  # type: ignore[import-not-found]

    samples = ["--epochs", str(options["epochs"]), "--nsamples", str(len(windows))]
    batches = [(window[None],) for window in windows]
    with tempfile.TemporaryDirectory() as scratch:
        sys.argv = ["main.py", *SCRIPT.split(), *samples, "--output_dir", scratch]
        arguments, logger = args_utils.parser_gen()
        utils.seed_everything(seed=arguments.seed)
        model = load(folder)
        model.seqlen = windows.shape[1]
        model.eval()
        apply_flatquant_to_llama_31(arguments, model)
        train_utils.cali_flat_quant(arguments, model, batches, utils.DEV, logger=logger)
    flat_utils.reparameterize_model(model)
    rtn_fwrd(model, utils.DEV, arguments)
    model.to(utils.DEV)

    @contextmanager
    def exact_activations() -> Iterator[None]:
        quant_utils.set_act_quantizer_state(model, enable=False)
        yield
        quant_utils.set_act_quantizer_state(model, enable=True)

    return model, exact_activations


def load(folder: Path) -> Any:
    """Load the model; its version of transformers reads `rope_theta` at the top of the config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters", {})
    config.setdefault("rope_theta", rope.get("rope_theta"))
    made = LlamaConfig(**config)
    made._attn_implementation_internal = "eager"
    return LlamaForCausalLM.from_pretrained(folder, config=made, torch_dtype=torch.float32)


if __name__ == "__main__":
    answer(quantize)

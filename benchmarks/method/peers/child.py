"""What each child does: quantize in its own process, then take the loss through transformers.

    python -m benchmarks.method.peers.CHILD REQUEST.json

The request names the model, the file of token windows and the options; the last line printed is the
answer as JSON. The quantizer's own fake quantization stands for the format.
"""

import importlib.metadata
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

CALIBRATION = "calibration"
CONTROL_WINDOWS = 2  # of the first text, for the loss with activations left as they are

# Takes the model's folder, the calibration windows and the options; gives the model, and a context
# in which its activations are not rounded (None where they never are).
Quantize = Callable[
    [Path, Tensor, dict[str, Any]], tuple[Any, Callable[[], AbstractContextManager[None]] | None]
]


def answer(quantize: Quantize) -> None:
    """Serve the request that the command line names, and print the answer."""
    request = json.loads(Path(sys.argv[1]).read_text())
    tensors = load_file(request["tokens"])
    calibration = tensors.pop(CALIBRATION)[: request["windows"]]
    torch.manual_seed(0)
    began, used = time.monotonic(), cpu_seconds()
    model, exact_activations = quantize(Path(request["model"]), calibration, request["options"])
    made = {
        "seconds": time.monotonic() - began,
        "cpu_seconds": cpu_seconds() - used,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(made), file=sys.stderr, flush=True)
    model.eval()
    losses = {}
    for name in request["texts"]:
        losses[name] = window_losses(model, tensors[name])
        print(name, float(losses[name].mean()), file=sys.stderr, flush=True)
    first = request["texts"][0]
    control = {"rounded": float(losses[first][:CONTROL_WINDOWS].mean())}
    if exact_activations is not None:
        with exact_activations():
            exact = window_losses(model, tensors[first][:CONTROL_WINDOWS])
        control["exact"] = float(exact.mean())
    told = {
        **made,
        "loss": {name: float(loss.mean()) for name, loss in losses.items()},
        "control": control,
        "versions": versions(request["distributions"]),
    }
    print(json.dumps(told), flush=True)


def cpu_seconds() -> float:
    """Processor time of this process and those it waited for."""
    every = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in every)


@torch.no_grad()
def window_losses(model: Any, windows: Tensor) -> Tensor:
    """Mean loss of each window, nats a token, its first token not counted: float64 [windows]."""
    rows = []
    for window in windows:
        scores = model(window[None], use_cache=False).logits[0, :-1]
        rows.append(torch.nn.functional.cross_entropy(scores.to(torch.float64), window[1:]))
    return torch.stack(rows)


def versions(distributions: list[str]) -> dict[str, str]:
    """Versions in this environment."""
    found = {name: importlib.metadata.version(name) for name in distributions}
    return {"python": platform.python_version(), **found}

"""What static inputs of o and down cost alone: a pretrained model with nothing else in 8 bits.

    python -m benchmarks.method.carried MODEL --calibration FILE [FILE ...] --text FILE

Inputs are rounded with steps of each row's kind, in some rows the linear's weights too, with the
steps in their columns; the loss is the reference forward's on the first windows of the text.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergequant import Options
from mergequant.calibration.tokenizer import load_tokenizer
from mergequant.evaluate.perplexity import reference_logprobs, text_windows
from mergequant.evaluate.reference_forward import load_model
from mergequant.model.architecture import MIDDLE, MIX
from mergequant.model.architectures import find
from mergequant.model.equalized_reader import as_carried, as_read, equalized
from mergequant.quantizer.carried_steps import carried_steps
from mergequant.quantizer.inputs.record import ClipSearch
from mergequant_vllm.rounding import largest_code, round_to_codes

LENGTH, WINDOWS, CALIBRATION, BITS = 512, 8, 24, 8
Steps = Callable[[Tensor, Tensor, Any], Tensor]


def collect(model: Any, names: list[str], windows: Tensor) -> dict[str, Tensor]:
    """What the linears read: [tokens, K] by name."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append(inputs[0].flatten(0, -2).clone())
        )
        for name in names
    ]
    with torch.no_grad():
        for part in windows.split(4):
            model(part, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@contextmanager
def rounded(model: Any, steps: dict[str, Tensor], group: int | None) -> Iterator[None]:
    """Inputs with static steps; weights too unless `group` is None, K: a step for each output."""
    handles, kept = [], {}
    for name, step in steps.items():
        module = model.get_submodule(name)
        handles.append(
            module.register_forward_pre_hook(
                lambda _, inputs, step=step: (round_to_codes(inputs[0] / step, BITS) * step,)
            )
        )
        if group is not None:
            kept[name] = module.weight.data
            columns = (module.weight.data * step).unflatten(1, (-1, group or len(step)))
            own = columns.abs().amax(-1, keepdim=True) / largest_code(BITS)
            module.weight.data = (round_to_codes(columns / own, BITS) * own).flatten(1) / step
    yield
    for handle in handles:
        handle.remove()
    for name, weight in kept.items():
        model.get_submodule(name).weight.data = weight


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Static inputs of o and down, each alone.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True)
    given = parser.parse_args()
    model, tokenizer = load_model(given.model), load_tokenizer(given.model)
    config = model.config.to_dict()
    windows = text_windows(given.text, tokenizer, LENGTH, WINDOWS)
    each = CALIBRATION // len(given.calibration)
    texts = [text_windows(file, tokenizer, LENGTH, each) for file in given.calibration]
    architecture = find(config["model_type"])
    by_space = {linear.reads: linear for linear, _ in equalized(architecture)}
    blocks = [architecture.block.format(block=x) for x in range(config["num_hidden_layers"])]

    def loss() -> float:
        return -float(reference_logprobs(model, windows).mean())

    def largest(x: Tensor, weight: Tensor, linear: Any) -> Tensor:
        seen = as_carried(x, config, linear).abs().amax(dim=0)
        return as_read(seen.clamp(min=1e-8) / largest_code(BITS), config, linear)

    def searched(x: Tensor, weight: Tensor, linear: Any) -> Tensor:
        search = ClipSearch(Options().lowest_clip, Options().clip_points)
        return carried_steps([x], weight, linear, config, BITS, BITS, search).float()

    rows: list[tuple[str, str, Steps, int | None]] = [
        (MIX, "o: inputs and weights, steps by Eq. 7", searched, 0),
        (MIDDLE, "down: inputs, by the largest value seen", largest, None),
        (MIDDLE, "down: inputs, with headroom", searched, None),
        (MIDDLE, "down: inputs and weights, a step for each output", searched, 0),
        (MIDDLE, "down: inputs and weights in groups of 64", searched, 64),
    ]
    full = loss()
    print(f"Loss in full precision {full:.4f} nats a token.\n\n| | excess |\n|---|---:|")
    for space, label, steps, group in rows:
        linear = by_space[space]
        names = [f"{block}.{linear.name}" for block in blocks]
        inputs = collect(model, names, torch.cat(texts))
        chosen = {
            name: steps(x, model.get_submodule(name).weight.data, linear)
            for name, x in inputs.items()
        }
        with rounded(model, chosen, group):
            print(f"| {label} | {loss() - full:+.4f} |", flush=True)


if __name__ == "__main__":
    main()

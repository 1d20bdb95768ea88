"""Child of llm-compressor: a preset scheme with GPTQ, after SpinQuant or SmoothQuant if asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.method.peers.child import answer


def quantize(folder: Path, windows: Tensor, options: dict[str, Any]) -> tuple[Any, Any]:
    """Quantize all linear layers but the output's; no scheme leaves the model as it is."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if "scheme" not in options:
        return model, None
    from llmcompressor import oneshot  # type: ignore[import-not-found]

    samples = [{"input_ids": x[None], "attention_mask": torch.ones_like(x)[None]} for x in windows]
    oneshot(
        model=model,
        dataset=torch.utils.data.DataLoader(samples, batch_size=None),  # type: ignore[arg-type]
        recipe=recipe(options),
        num_calibration_samples=len(samples),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
    )

    @contextmanager
    def exact_activations() -> Iterator[None]:
        schemes = {id(x): x for x in map(scheme_of, model.modules()) if x is not None}
        kept = {key: scheme.input_activations for key, scheme in schemes.items()}
        for scheme in schemes.values():
            scheme.input_activations = None
        yield
        for key, scheme in schemes.items():
            scheme.input_activations = kept[key]

    return model, exact_activations if "A16" not in options["scheme"] else None


def scheme_of(module: torch.nn.Module) -> Any:
    """The scheme of a quantized layer, None of any other."""
    return getattr(module, "quantization_scheme", None)


def recipe(options: dict[str, Any]) -> list[Any]:
    """The modifiers in order; a group size of null is one step per channel."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]

    scheme = preset_name_to_scheme(options["scheme"], ["Linear"])
    if "group_size" in options:
        size = options["group_size"]
        shape = {"strategy": "group" if size else "channel", "group_size": size}
        scheme.weights = type(scheme.weights)(**{**scheme.weights.model_dump(), **shape})
    modifiers: list[Any] = []
    if rotations := options.get("rotations"):
        from llmcompressor.modifiers.transform import (  # type: ignore[import-not-found]
            SpinQuantModifier,
        )

        made = SpinQuantModifier(rotations=rotations, transform_type="random-hadamard")
        modifiers.append(made)
    if strength := options.get("smooth"):
        from llmcompressor.modifiers.transform.smoothquant import (  # type: ignore[import-not-found]
            SmoothQuantModifier,
        )

        modifiers.append(SmoothQuantModifier(smoothing_strength=strength))
    return [*modifiers, GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])]


if __name__ == "__main__":
    answer(quantize)

"""What quantizing costs, by the reference forward: for benchmarks that compare options."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergequant import Options
from mergequant.calibration.tokenizer import load_tokenizer
from mergequant.evaluate.perplexity import reference_logprobs, text_windows
from mergequant.evaluate.reference_forward import load_model
from mergequant.quantizer.in_memory import quantize_in_memory


class Quantized(NamedTuple):
    """A quantized model in memory; `report`: a line for each linear."""

    model: Any
    report: list[dict[str, Any]]


class Yardstick:
    """One model's loss on the first `most` windows of a text, `length` tokens each."""

    def __init__(self, model: Path, text: Path, length: int, most: int) -> None:
        self.model = model
        self.windows = text_windows(text, load_tokenizer(model), length, most)
        self.full_precision = self.loss(load_model(model))

    def loss(self, model: Any) -> float:
        """Nats a token."""
        return -float(reference_logprobs(model, self.windows).mean())

    def excess(self, model: Any) -> float:
        """Loss above full precision."""
        return self.loss(model) - self.full_precision

    def quantize(self, calibration: Sequence[Path], options: Options) -> Quantized:
        """The model with `options`."""
        return Quantized(*quantize_in_memory(self.model, calibration, options, progress=False))

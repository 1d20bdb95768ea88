"""One-sided outliers change nothing but the channels' ranges."""

from pathlib import Path

import pytest
import torch

from benchmarks.method.one_sided import with_one_sided_outliers
from mergequant.model.architectures import find
from mergequant.model.decoder import Decoder
from mergequant.model.reader import Reader
from tests.mergequant.model.same_function import WINDOWS, logits
from tests.tiny import make_model


@pytest.mark.parametrize("model_type", ["opt", "bloom"])
def test_the_function_stays_and_the_channels_lean(tmp_path: Path, model_type: str) -> None:
    source = Reader(make_model(tmp_path / "plain", model_type))
    target = Reader(with_one_sided_outliers(source.folder, tmp_path / "outliers"))
    exact, found = (logits(x, torch.float64) for x in (source, target))
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-5  # stored in float32
    decoder = Decoder(target, find(model_type), torch.device("cpu"))
    seen: list[torch.Tensor] = []
    with decoder.block(0) as block:
        batches = decoder.embed(WINDOWS, statistics=1, gptq=1).batches
        block.observe(find(model_type).linears[0].name, batches, seen.append)
    x = torch.cat(seen)
    spans = x.amax(dim=0) - x.amin(dim=0)
    largest = spans.argmax()
    assert spans[largest] > 8 * spans.median()
    middle = (x.amax(dim=0) + x.amin(dim=0))[largest].abs() / 2
    assert middle > spans[largest] / 4

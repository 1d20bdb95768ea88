"""A LayerNorm whose bias, as stored, is too coarse for the middle of a channel."""

from pathlib import Path

import torch

from mergequant.methods.clip import ChannelRange
from mergequant.model.architectures import find
from mergequant.model.decoder import Decoder
from mergequant.model.reader import Reader
from mergequant.quantizer.inputs.static import _folded
from tests.tiny import make_model


def test_codes_still_reach_both_ends(tmp_path: Path) -> None:
    architecture = find("opt")
    decoder = Decoder(Reader(make_model(tmp_path, "opt")), architecture, torch.device("cpu"))
    low = torch.linspace(-3.0, 200.0, 64)
    spans = ChannelRange.between(low, low + 1.0, 8)  # far from the bias, narrow
    step = (spans.extent / spans.levels).to(torch.float64)
    with decoder.block(0) as block:
        folded, shift = _folded(architecture.norms[0], block, spans, step)
    assert shift is not None
    assert bool((folded.step > 1.5 * step).any()) and bool((folded.step >= 0.99 * step).all())
    for end in (low, low + 1.0):
        codes = (end - shift) / folded.step
        assert float(codes.min()) > -128.75 and float(codes.max()) < 127.75

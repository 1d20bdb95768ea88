"""A model quantized in memory is the checkpoint's, and a damaged decision is refused."""

import json
from pathlib import Path

import pytest
import torch

from mergequant import InputError, Options, quantize
from mergequant.evaluate.reference_forward import load_model
from mergequant.output.writer import Writer
from mergequant.quantizer.in_memory import quantize_in_memory
from tests.conftest import SMALL, WHOLE

FORMS = {
    "whole": WHOLE,
    "rotated, mixed heads": SMALL.model_copy(update={"rotation": "online", "mix_heads": 2}),
    "zero points": SMALL.model_copy(
        update={"static_zero_points": True, "dynamic_zero_points": True, "segments": 2}
    ),
    "one left out": SMALL.model_copy(update={"ignore": ("model.layers.0.mlp.down_proj",)}),
}


@pytest.mark.parametrize("name", list(FORMS))
def test_in_memory_it_is_the_checkpoint(tmp_path: Path, text: Path, llama: Path, name: str) -> None:
    folder = quantize(llama, tmp_path / "out", [text], FORMS[name], progress=False)
    model, report = quantize_in_memory(llama, [text], FORMS[name], progress=False)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_model(folder)(ids).logits)
    lines = (folder / "quantization_report.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    for line in (*report, *written):
        del line["seconds"]
        line.pop("peak_bytes", None)
    assert report == written


def test_a_decision_that_is_damaged_is_refused(tmp_path: Path, llama: Path, text: Path) -> None:
    output = tmp_path / "out"
    options = Options.model_validate({**SMALL.model_dump(), "reconstruction": "prune"})
    with pytest.MonkeyPatch.context() as patch:
        original, calls = Writer.write_block, 0

        def stop(self: Writer, *arguments: object) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise KeyboardInterrupt
            original(self, *arguments)  # type: ignore[arg-type]

        patch.setattr(Writer, "write_block", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(llama, output, [text], options, progress=False)
    decision = output / ".partial" / "decision.json"
    assert json.loads(decision.read_text())["reconstruction"] == "prune"
    kept = json.loads(decision.read_text())
    decision.write_text(json.dumps({**kept, "reconstruction": "fold"}))
    with pytest.raises(InputError, match=r"decision.json is damaged .* begin again"):
        quantize(llama, output, [text], options, progress=False)

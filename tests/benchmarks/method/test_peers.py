"""The comparison with other quantizers: its rows, its tokens and its way of counting a loss."""

import argparse
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.method.model_rows import FULL, known, with_excess
from benchmarks.method.peers import __main__ as peers
from benchmarks.method.peers.child import CALIBRATION, window_losses
from benchmarks.method.peers.rows import ROWS, Peer
from mergequant.calibration.sources import calibration_sources
from mergequant.calibration.text import calibration_windows
from mergequant.calibration.tokenizer import load_tokenizer
from mergequant.evaluate.perplexity import text_windows, token_logprobs
from tests.tiny import make_model


def row(name: str, loss: float) -> peers.Row:
    return peers.Row(name, {"text": loss}, {}, 4, 2.0, 1.0, 1.0, {"torch": "1"})


@pytest.mark.parametrize("peer", ROWS.values(), ids=list(ROWS))
def test_each_row_has_a_child_and_options_that_json_carries(peer: Peer) -> None:
    assert importlib.util.find_spec(f"benchmarks.method.peers.{peer.module}") is not None
    assert json.loads(json.dumps(peer.options)) == peer.options


def test_rows_stand_in_their_order_with_their_loss_above_full_precision() -> None:
    name = "llm-compressor W4A4: GPTQ"
    rows = with_excess([row(name, 1.5), row(FULL, 1.0)], ROWS)
    assert [row.name for row in rows] == [FULL, name]
    assert f"| {name} | +0.5000 | INT4 in groups of 64 |" in peers.table(rows)


def test_rows_of_the_same_command_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    assert known(file, "command", peers.Row) == []
    rows = [row(FULL, 1.0)]
    file.write_text(json.dumps({"command": "command", "rows": [vars(row) for row in rows]}))
    assert known(file, "command", peers.Row) == rows
    assert known(file, "another", peers.Row) == []


def test_peers_are_given_the_windows_that_quantize_takes(tmp_path: Path, text: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    limits = {"samples": 4, "sequence": 32, "length": 64, "windows": 2}
    given = argparse.Namespace(model=model, calibration=[text], text=[text], **limits)
    peers.write_tokens(tmp_path / "tokens.safetensors", given)
    tensors = load_file(tmp_path / "tokens.safetensors")
    tokenizer = load_tokenizer(model)
    taken = calibration_windows(
        calibration_sources([text]), tokenizer, samples=4, length=32, seed=0
    )
    assert torch.equal(tensors[CALIBRATION], taken)
    assert torch.equal(tensors[text.stem], text_windows(text, tokenizer, 64, 2))


def test_a_loss_is_counted_as_the_perplexity_counts_it() -> None:
    windows = torch.randint(0, 11, (3, 8), generator=torch.Generator().manual_seed(0))
    table = torch.randn(11, 11, generator=torch.Generator().manual_seed(1))

    def model(ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=table[ids])

    expected = -token_logprobs(table[windows], windows).mean(dim=1)
    torch.testing.assert_close(window_losses(model, windows), expected)

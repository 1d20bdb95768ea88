"""Part `start`: its folders are what servers load, a server that ends is said, its table."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.common.shapes import MODELS
from benchmarks.cpu.machine import process_group_bytes
from benchmarks.cpu.start import folders, measure
from benchmarks.cpu.start import table as start_table
from mergequant.evaluate.reference_forward import load_model
from mergequant.model.reader import Reader
from mergequant_vllm.format import StoredTensor, check_tensors, parse

TINY = MODELS["tiny"]


def test_the_source_is_a_whole_model(tmp_path: Path) -> None:
    folder = folders.write_source(tmp_path / "source", TINY, 64)
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_the_quantized_folder_keeps_the_contract(tmp_path: Path) -> None:
    folder = folders.write_quantized(tmp_path / "quantized", TINY, 64)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    headers = Reader(folder).headers
    stored = {name: StoredTensor(tuple(x.shape), x.dtype) for name, x in headers.items()}
    check_tensors(parse(config), stored)
    assert load_model(folder)(torch.arange(8)[None]).logits.isfinite().all()


def test_a_server_that_ends_is_said_with_its_first_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("INFO\nValueError: no such model\nValueError: no engine\n")
    server = subprocess.Popen([sys.executable, "-c", ""])
    server.wait()
    with pytest.raises(RuntimeError, match=r"did not start: \['ValueError: no such model'\]"):
        measure._wait("http://127.0.0.1:9", server, log)


def test_memory_is_that_of_the_whole_group() -> None:
    code = "import time, os; x = b'1' * 50_000_000; os.fork(); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        for _ in range(200):
            held = process_group_bytes(child.pid)
            if held > 50_000_000:
                break
            time.sleep(0.05)
        assert 50_000_000 < held < 90_000_000  # the copy shares its pages
    finally:
        os.killpg(child.pid, 9)
        child.wait()


def test_the_table_has_seconds_and_mebibytes() -> None:
    row = {"name": "ours", "start": "second", "ready": 9.96, "first_token": 10.44}
    text = start_table.table("tiny at random", "1", [{**row, "resident": 3 * 2**20}])
    assert "`vllm serve tiny at random`" in text
    assert "| ours | second | 10.0 | 10.4 | 3 |" in text

"""Block by block, a model computes what transformers computes in one go."""

import gc
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from mergequant.evaluate.reference_forward import load_model
from mergequant.model.architectures import ARCHITECTURES, find
from mergequant.model.decoder import Decoder, frozen_heap
from mergequant.model.reader import Reader
from mergequant.model.rotated_reader import RotatedReader
from tests.tiny import make_model

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in sorted(ARCHITECTURES)),
    ("mistral", {"sliding_window": 8}),
    ("cohere2", {"sliding_window": 8}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
]


@pytest.mark.parametrize(("model_type", "more"), CASES, ids=lambda case: str(case)[:30])
def test_blocks_add_up_to_the_model(tmp_path: Path, model_type: str, more: dict[str, Any]) -> None:
    folder = make_model(tmp_path / "model", model_type, heads=4, kv_heads=2, **more)
    windows = torch.randint(2, 250, (3, 40), generator=torch.Generator().manual_seed(0))
    reader = Reader(folder)
    decoder = Decoder(reader, find(model_type), torch.device("cpu"))
    activations = decoder.embed(windows, statistics=1, gptq=2)
    assert (activations.statistics, activations.gptq) == (1, 2)
    for number in range(reader.config["num_hidden_layers"]):
        with decoder.block(number) as block:
            activations.batches = [block.forward(hidden) for hidden in activations.batches]
        assert all(parameter.is_meta for parameter in block.module.parameters())
    model = load_model(folder)
    with torch.no_grad():
        body = model.get_submodule(decoder.architecture.body)
        expected = body(windows, use_cache=False).last_hidden_state
        norm = model.get_submodule(decoder.architecture.final_norm.name)
        ours = norm(torch.cat(activations.batches))
    # The same float32 operations, batched otherwise: some roundings of numbers of size 1 to 10.
    assert torch.allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rotation", ["offline", "online"])
def test_a_rotated_models_blocks_are_the_same_model_however_often_they_are_loaded(
    llama: Path, rotation: Literal["offline", "online"]
) -> None:
    windows = torch.randint(2, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    reader = RotatedReader(Reader(llama), find("llama"), rotation, seed=0)
    decoder = Decoder(reader, find("llama"), torch.device("cpu"))
    inputs: list[torch.Tensor] = []
    hidden = decoder.embed(windows, statistics=2, gptq=2).batches
    with decoder.block(0) as block:  # as a pilot does
        block.observe("mlp.down_proj", hidden, inputs.append)
    for number in range(reader.config["num_hidden_layers"]):
        with decoder.block(number, keep=True) as block:
            if number == 0:
                block.observe("mlp.down_proj", hidden, inputs.append)
    assert torch.equal(inputs[0], inputs[1])
    with torch.no_grad():
        ours = decoder.whole_model()(windows, use_cache=False).logits
        expected = load_model(llama)(windows, use_cache=False).logits
    assert torch.allclose(ours, expected, rtol=0, atol=1e-4)  # logits of size 1 to 10


def test_observing_stops_before_the_linear_is_computed(llama: Path) -> None:
    decoder = Decoder(Reader(llama), find("llama"), torch.device("cpu"))
    activations = decoder.embed(torch.arange(2, 22)[None], statistics=1, gptq=1)
    shapes: list[torch.Size] = []
    with decoder.block(0) as block:
        block.observe("mlp.down_proj", activations.batches, lambda x: shapes.append(x.shape))
        assert block.forward(activations.batches[0]).shape == (1, 20, 64)
    assert shapes == [torch.Size((20, 172))]


@pytest.fixture
def thawed() -> None:
    """No library that a test before has loaded keeps objects frozen."""
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_garbage_collections_leave_out_what_was_there_before() -> None:
    with frozen_heap():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("thawed")
def test_the_heap_is_thawed_whatever_happens() -> None:
    def fail() -> None:
        with frozen_heap():
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert gc.get_freeze_count() == 0


def test_what_others_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        with frozen_heap():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()

"""The examples' optimizer is PyTorch's, but for the dtype that it iterates in."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_steps_as_pytorchs_does(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    begin = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(begin.clone()) for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1, "ns_steps": 3}
    optimizers = load("muon").Muon([ours], **options), torch.optim.Muon([theirs], **options)
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = theirs.detach() - begin
    # Theirs rounds to bfloat16, 2^-9, in each of some ten products on the way.
    assert float((ours.detach() - theirs.detach()).norm()) < 10 * 2**-9 * float(moved.norm())

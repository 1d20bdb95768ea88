"""Models made hostile by hand, and the whole method for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import SMALL
from tests.tiny import make_model

Weights = dict[str, Tensor]
Edit = Callable[[Weights], object]
WHOLE = SMALL.model_copy(
    update={
        "reconstruction": "auto",
        "max_extra_channels": 0.25,
        "split_by": "folded",
        "staggered": True,
        "weight_search": "mse",
        "compensation_rank": 8,
        "compensation_epochs": 2,
        "compensation_samples": 8,
    }
)


def edited(folder: Path, edit: Edit, **config: Any) -> Path:
    """Save a random model, of one block unless `config` says so, whose tensors `edit` changed."""
    make_model(folder, **{"blocks": 1, **config})
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

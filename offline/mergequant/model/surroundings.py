"""What `transformers` computes around the blocks: what enters the first, what each is given.

Its own code does: embedding factors, tables of positions, norms behind the embedding, rotary
positions, ALiBi, masks and windows are the model's affair. The blocks are left out by standing in
for their forward passes.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


class _ReachedError(Exception):
    """Ends a pass at the block that was waited for."""


@dataclass(frozen=True)
class Entry:
    """What a block is called with.

    Attributes:
        hidden: [windows, length, n].
        arguments: by keyword.
    """

    hidden: Tensor
    arguments: Mapping[str, Any]


class Surroundings:
    """The modules around the blocks of a model whose parameters are on the meta device.

    Args:
        model: the `transformers` model.
        body: its module that runs the blocks.
        blocks: these.
        embedding: the table of tokens.
        device: where to compute.
    """

    def __init__(
        self,
        model: Any,
        body: Any,
        blocks: Sequence[nn.Module],
        embedding: Any,
        device: torch.device,
    ) -> None:
        self._body, self._blocks, self._embedding = body, blocks, embedding
        self._device = device
        embedding.padding_idx = None  # its row may not be among those that are looked up
        _fill_buffers(model, device)

    def load(self, tensors: Mapping[str, Tensor], model: Any) -> None:
        """Take tensors of modules around the blocks, by full name in `model`."""
        placed = {name: x.to(self._device, torch.float32) for name, x in tensors.items()}
        model.load_state_dict(placed, strict=False, assign=True)

    def enter(self, ids: Tensor, table: Tensor) -> Tensor:
        """What the first block reads of tokens: float32 [windows, length, n].

        Args:
            ids: int64 [windows, length].
            table: [vocabulary, n]; only rows that occur come to the device.
        """
        rows, numbers = torch.unique(ids, return_inverse=True)
        kept = self._embedding.weight
        placed = table[rows].to(self._device, torch.float32)
        self._embedding.weight = nn.Parameter(placed, requires_grad=False)
        try:
            return self._reach(0, input_ids=numbers.to(self._device)).hidden
        finally:
            self._embedding.weight = kept

    def arguments(self, hidden: Tensor, number: int) -> Mapping[str, Any]:
        """What block `number` is given beside hidden states [windows, length, n] like these."""
        return self._reach(number, inputs_embeds=hidden.detach()).arguments

    @torch.no_grad()
    def _reach(self, number: int, **inputs: Tensor) -> Entry:
        """Run the body up to block `number`, the blocks before it doing nothing."""
        entries: list[Entry] = []

        def stop(hidden: Tensor, **arguments: Any) -> None:
            entries.append(Entry(hidden, arguments))
            raise _ReachedError

        with _standing_in(self._blocks[: number + 1], stop), suppress(_ReachedError):
            self._body(use_cache=False, **inputs)
        return entries[0]


class _Anything:
    """What a block that does nothing returns: hidden states, or a tuple that begins with them."""

    def __getitem__(self, _: int) -> "_Anything":
        return self


@contextmanager
def _standing_in(blocks: Sequence[Any], last: Any) -> Iterator[None]:
    """Let `blocks` do nothing, but the last, which does `last`."""

    def hand_on(*_: Any, **__: Any) -> _Anything:
        return _Anything()

    for block in blocks:
        block.forward = hand_on
    blocks[-1].forward = last
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Put numbers into buffers that no file holds, such as rotary frequencies.

    They are those of the same model without blocks and with a vocabulary of a few tokens, which is
    small enough to be made in full.
    """
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 0, 8, None
    small: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, buffer in small.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(device))

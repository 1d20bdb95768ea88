"""A model with one decoder block in memory at a time, run on the calibration windows."""

import ctypes
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from mergequant.model.architecture import Architecture, factor
from mergequant.model.block import Block
from mergequant.model.head_loss import Head, next_token_losses
from mergequant.model.hugging_face_config import load_config
from mergequant.model.reader import ModelReader
from mergequant.model.shapes import outer_tensors
from mergequant.model.surroundings import Surroundings

TOKENS_A_BATCH = 4096


def _return_freed_memory() -> None:
    """Give what the last block freed back to the system.

    glibc keeps freed pages that lie between used ones; over 32 blocks of 13 MiB they came to more
    than the whole model.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Leave what is there already out of garbage collections for the time of the context.

    There is one after each block, and what PyTorch and transformers keep takes it a fifth of a
    second to look through. Where the calling program has frozen objects itself, nothing is done.
    """
    if gc.get_freeze_count() > 0:
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass
class Activations:
    """Hidden states of the calibration windows, in batches, at the border of two blocks.

    Attributes:
        batches: [windows, length, n] each.
        statistics: how many batches, from the first, serve for steps and clip ratios.
        gptq: how many, from the first, serve for Hessians.
        exact: what the full-precision model has in place of the first batches, as many as the
            compensation trains on.
        behind: how many batches, from the first, are behind the present block already.
    """

    batches: list[Tensor]
    statistics: int
    gptq: int
    exact: list[Tensor]
    behind: int = 0

    def advance(self, forward: Callable[[Tensor], Tensor], exact: list[Tensor]) -> None:
        """Go behind a block: `forward` is the quantized one, `exact` what the plain one emits."""
        for index in range(self.behind, len(self.batches)):
            self.batches[index] = forward(self.batches[index])  # the old one is freed
        self.exact, self.behind = exact, 0


class Decoder:
    """The skeleton of a Hugging Face model, on the meta device until a block is asked for."""

    def __init__(
        self, reader: ModelReader, architecture: Architecture, device: torch.device
    ) -> None:
        self.reader = reader
        self.architecture = architecture
        self.device = device
        self.config = load_config(reader.folder)
        with torch.device("meta"):
            self._model: Any = AutoModelForCausalLM.from_config(
                self.config, dtype=torch.float32
            ).eval()
        self._blocks: Any = self._model.get_submodule(architecture.blocks)
        self._around = Surroundings(
            self._model,
            self._model.get_submodule(architecture.body),
            self._blocks,
            self._model.get_submodule(architecture.embedding.name),
            device,
        )
        outer = [x.name for x in architecture.outer if x.name in reader.headers]
        self._around.load({name: reader.read(name) for name in outer}, self._model)

    def embed(
        self, windows: Tensor, statistics: int, gptq: int, compensation: int = 0
    ) -> Activations:
        """The first block's input.

        Args:
            windows: token ids int64 [samples, length].
            statistics: windows, from the first, that serve for steps and clip ratios.
            gptq: windows, from the first, that serve for Hessians.
            compensation: windows, from the first, that the compensation trains on.
        """
        table = self.reader.read_in_source_dtype(f"{self.architecture.embedding.name}.weight")
        size = max(1, TOKENS_A_BATCH // windows.shape[1])
        wanted = (statistics, gptq, compensation, len(windows))
        borders = sorted({0, *(min(count, len(windows)) for count in wanted)})
        batches: list[Tensor] = []
        counts = {0: 0}
        for start, stop in itertools.pairwise(borders):
            for ids in torch.split(windows[start:stop], size):
                batches.append(self._around.enter(ids, table))
            counts[stop] = len(batches)
        return Activations(
            batches=batches,
            statistics=counts[min(statistics, len(windows))],
            gptq=counts[min(gptq, len(windows))],
            exact=batches[: counts[min(compensation, len(windows))]],
        )

    def whole_model(self) -> Any:
        """The `transformers` model around the blocks, which must all have been kept."""
        names = outer_tensors(self.architecture, dict(self.reader.config))
        self._around.load(
            {self.architecture.in_transformers(name): self.reader.read(name) for name in names},
            self._model,
        )
        self._model.config.tie_word_embeddings = self.reader.config.get(
            "tie_word_embeddings", False
        )
        self._model.tie_weights()
        return self._model.requires_grad_(False)

    def loss_gradient(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Gradient of the next tokens' summed loss with respect to the last block's output.

        Args:
            hidden: that output, [windows, length, n].
            ids: the windows' tokens, int64 [windows, length].

        Returns:
            like `hidden`.
        """
        head, gradients = self._head(), []
        with self._final_norm() as norm:
            for window, tokens in zip(hidden, ids.to(self.device), strict=True):
                x = window.detach().requires_grad_()
                with torch.enable_grad():
                    logits = head.logits(norm(x)[:-1], slice(None))
                    loss = F.cross_entropy(logits, tokens[1:], reduction="sum")
                gradients += torch.autograd.grad(loss, x)
        return torch.stack(gradients)

    def loss(self, batches: Sequence[Tensor], ids: Tensor) -> float:
        """The next tokens' mean loss, nats a token.

        Args:
            batches: the last block's output, [windows, length, n] each.
            ids: tokens of the first of these windows, int64 [windows, length].
        """
        head = self._head()
        hidden = itertools.chain.from_iterable(batches)
        with torch.no_grad(), self._final_norm() as norm:
            losses = [
                next_token_losses(norm(window), head, tokens)
                for window, tokens in zip(hidden, ids.to(self.device), strict=False)
            ]
        return float(torch.cat(losses).mean())

    def _head(self) -> Head:
        """The head in the dtype of the source, on the device."""
        reader, architecture = self.reader, self.architecture
        tied = reader.config.get("tie_word_embeddings", False)
        owner = architecture.embedding if tied else architecture.head
        table = reader.read_in_source_dtype(f"{owner.name}.weight").to(self.device)
        bias = f"{owner.name}.bias"
        own = reader.read(bias).to(self.device) if bias in reader.headers else None
        return Head.of(architecture, reader.config, table, own)

    @contextmanager
    def _final_norm(self) -> Iterator[Any]:
        """The last norm in float32, on the device for the time of the context."""
        name = self.architecture.final_norm.name
        norm = self._model.get_submodule(name)
        parts = (f"{name}.weight", f"{name}.bias")
        self._around.load(
            {x: self.reader.read(x) for x in parts if x in self.reader.headers}, self._model
        )
        yield norm
        norm.to("meta")

    def walk(self, batches: list[Tensor], blocks: int, title: str, shown: bool) -> Iterator[Block]:
        """The first `blocks` blocks in turn, each with `batches` at its input.

        Args:
            batches: the first block's input, [windows, length, n] each; replaced in place by the
                next block's before that is yielded.
            title: of the progress bar, if one is `shown`.
        """
        for number in tqdm(range(blocks), desc=title, unit="block", disable=not shown):
            with self.block(number) as block:
                yield block
                if number + 1 < blocks:
                    for index, hidden in enumerate(batches):
                        batches[index] = block.forward(hidden)

    @contextmanager
    def block(self, number: int, *, keep: bool = False) -> Iterator[Block]:
        """Decoder block `number` in float32 on the device.

        It is unloaded when the context ends, unless it is to be kept for `whole_model`.
        """
        module: nn.Module = self._blocks[number]
        prefix = self.architecture.block.format(block=number)
        source_tensors = self.reader.read_block(prefix)
        weights = {
            name: tensor.to(self.device, torch.float32)
            for name, tensor in source_tensors.items()
            if not name.endswith(self.architecture.ignored_suffixes)
        }
        module.load_state_dict(weights, strict=True, assign=True)
        module.requires_grad_(False)
        del weights
        hooks = list(self._rotate_inputs(module, prefix))
        loaded = Block(
            module,
            source_tensors,
            prefix,
            number,
            self.device,
            lambda hidden: self._around.arguments(hidden, number),
            factor(self.architecture.scales.residual, self.reader.config),
        )
        try:
            yield loaded
        finally:
            loaded.restore()
            if not keep:
                module.to("meta")
                for hook in hooks:
                    hook.remove()
            _return_freed_memory()

    def _rotate_inputs(self, block: nn.Module, prefix: str) -> Iterator[RemovableHandle]:
        """What the server's linears do themselves, for those that are still in floating point."""
        for linear in self.architecture.linears:
            rotation = self.reader.online.get(f"{prefix}.{linear.name}")
            if rotation is not None:
                yield block.get_submodule(linear.name).register_forward_pre_hook(
                    lambda _, inputs, rotation=rotation: (rotation(inputs[0]),)
                )

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
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from mergequant.model.architecture import Architecture, factor, outer_tensors
from mergequant.model.block import Block
from mergequant.model.head_loss import next_token_losses
from mergequant.model.hugging_face_config import load_config
from mergequant.model.reader import ModelReader

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
                self.config, attn_implementation="sdpa", dtype=torch.float32
            ).eval()
        self._body: Any = self._model.model
        self._rotary: Any = type(self._body.rotary_emb)(config=self.config).to(device)

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
        scale = factor(self.architecture.scales.embedding, self.reader.config)
        size = max(1, TOKENS_A_BATCH // windows.shape[1])
        wanted = (statistics, gptq, compensation, len(windows))
        borders = sorted({0, *(min(count, len(windows)) for count in wanted)})
        batches: list[Tensor] = []
        counts = {0: 0}
        for start, stop in itertools.pairwise(borders):
            for ids in torch.split(windows[start:stop], size):
                batches.append(table[ids].to(self.device, torch.float32) * scale)
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
        outer = {name: self.reader.read(name).to(self.device, torch.float32) for name in names}
        self._body.rotary_emb = self._rotary
        self._model.load_state_dict(outer, strict=False, assign=True)
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
        reader, architecture = self.reader, self.architecture
        norm = self._model.get_submodule(architecture.final_norm.name)
        weight = reader.read(f"{architecture.final_norm.name}.weight")
        norm.load_state_dict({"weight": weight.to(self.device, torch.float32)}, assign=True)
        tied = self.reader.config.get("tie_word_embeddings", False)
        owner = architecture.embedding if tied else architecture.head
        table = reader.read(f"{owner.name}.weight").to(self.device, torch.float32)
        divisor = factor(architecture.scales.logits, reader.config)
        gradients = []
        for window, tokens in zip(hidden, ids.to(self.device), strict=True):
            x = window.detach().requires_grad_()
            with torch.enable_grad():
                logits = F.linear(norm(x)[:-1], table) / divisor
                loss = F.cross_entropy(logits, tokens[1:], reduction="sum")
            gradients += torch.autograd.grad(loss, x)
        norm.to("meta")
        return torch.stack(gradients)

    def loss(self, batches: Sequence[Tensor], ids: Tensor) -> float:
        """The next tokens' mean loss, nats a token.

        Args:
            batches: the last block's output, [windows, length, n] each.
            ids: tokens of the first of these windows, int64 [windows, length].
        """
        reader, name = self.reader, self.architecture.final_norm.name
        norm = self._model.get_submodule(name)
        weight = reader.read(f"{name}.weight").to(self.device, torch.float32)
        norm.load_state_dict({"weight": weight}, assign=True)
        tied = reader.config.get("tie_word_embeddings", False)
        owner = self.architecture.embedding if tied else self.architecture.head
        table = reader.read_in_source_dtype(f"{owner.name}.weight").to(self.device)
        divisor = factor(self.architecture.scales.logits, reader.config)
        hidden = itertools.chain.from_iterable(batches)
        with torch.no_grad():
            losses = [
                next_token_losses(norm(window) / divisor, table, tokens)
                for window, tokens in zip(hidden, ids.to(self.device), strict=False)
            ]
        norm.to("meta")
        return float(torch.cat(losses).mean())

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
        module: nn.Module = self._body.layers[number]
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
            lambda hidden: self.forward_arguments(hidden, number),
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

    def forward_arguments(self, hidden: Tensor, number: int) -> dict[str, Any]:
        """What `transformers` passes to a decoder block beside the hidden states."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        kinds = getattr(self.config, "layer_types", None)
        kind = kinds[number] if kinds else self._only_kind()
        make = (
            create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
        )
        mask = make(
            config=self.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
        )
        return {
            "attention_mask": mask,
            "position_embeddings": self._rotary(hidden, positions),
            "position_ids": positions,
            "use_cache": False,
        }

    def _only_kind(self) -> str:
        sliding = getattr(self.config, "sliding_window", None) is not None
        return "sliding_attention" if sliding else "full_attention"

"""The walk through the blocks: each is calibrated on what the quantized ones before it emit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from torch import Tensor
from tqdm import tqdm

from mergequant.model.block import Block
from mergequant.model.decoder import Activations, Decoder
from mergequant.quantizer.block import quantize_block
from mergequant.quantizer.inputs.record import refuse_infinite
from mergequant.quantizer.plan import Plan, Samples
from mergequant.quantizer.result import LinearResult

# Puts a finished block into place if it is at hand: whether it was.
Restore = Callable[[Block], bool]


def walk_blocks(
    decoder: Decoder,
    plan: Plan,
    windows: Tensor,
    *,
    finished: int = 0,
    restore: Restore = lambda _: False,
    keep: bool = False,
    at_end: Callable[[Activations], None] = lambda _: None,
    progress: bool = True,
) -> Iterator[tuple[Block, list[LinearResult]]]:
    """Quantize every block in turn; yields it, quantized, with what became of its linears.

    Args:
        windows: token ids int64 [samples, length].
        finished: how many blocks, from the first, `restore` will put into place.
        restore: see `Restore`; such a block is yielded without results.
        keep: the blocks stay loaded.
        at_end: is given what the last block emits.
        progress: show a bar with block, loss and time left.
    """
    activations = embed(decoder, windows, plan.samples)
    with _progress_bar(plan, finished, progress) as bar:
        for number, block_plan in enumerate(plan.blocks):
            bar.set_description(f"Block {number + 1}/{len(plan.blocks)}")
            with decoder.block(number, keep=keep) as block:
                targets = [block.forward(hidden) for hidden in activations.exact]
                results: list[LinearResult] = []
                if not restore(block):
                    results = quantize_block(
                        block, decoder.architecture, activations, targets, block_plan, bar
                    )
                yield block, results
                del results
                _advance(block, activations, targets)
    at_end(activations)


def _advance(block: Block, activations: Activations, targets: list[Tensor]) -> None:
    """Take `activations` through a quantized block; `targets` is what the plain one emits.

    Raises:
        InputError: either is not finite.
    """
    activations.advance(block.forward, targets)
    for hidden in (*activations.batches, *activations.exact):
        refuse_infinite(hidden, f"The output of {block.name}")


def embed(decoder: Decoder, windows: Tensor, samples: Samples) -> Activations:
    """The first block's input, for each of its uses."""
    return decoder.embed(windows, samples.statistics, samples.hessians, samples.training)


@contextmanager
def _progress_bar(plan: Plan, finished: int, shown: bool) -> Iterator["tqdm[NoReturn]"]:
    """A bar over linears, and epochs of the compensation."""
    done = sum(block.steps for block in plan.blocks[:finished])
    total = sum(block.steps for block in plan.blocks)
    with tqdm(total=total, initial=done, unit="step", disable=not shown) as bar:
        yield bar

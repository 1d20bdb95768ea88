"""The method on one page: a 16-bit model in, a mergequant checkpoint out, block by block."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from mergequant.calibration.text import sha256_of
from mergequant.layers.in_block import load_stored
from mergequant.model.architecture import Architecture
from mergequant.model.block import Block
from mergequant.model.channels import Channels
from mergequant.model.decoder import Activations, Decoder, frozen_heap
from mergequant.model.reader import ModelReader
from mergequant.model.shapes import outer_tensors
from mergequant.options import Options
from mergequant.output.disk_space import checkpoint_bytes, refuse_if_full
from mergequant.output.fingerprint import fingerprint
from mergequant.output.model_card import CalibrationLoss
from mergequant.output.writer import Writer
from mergequant.quantizer.decide import decide
from mergequant.quantizer.decision import Decision
from mergequant.quantizer.head import quantize_head
from mergequant.quantizer.left_out import left_out
from mergequant.quantizer.memory.available import peak_bytes, refuse_if_short
from mergequant.quantizer.memory.needed import needed_memory
from mergequant.quantizer.pilot_walk import pilot_windows
from mergequant.quantizer.plan import Plan
from mergequant.quantizer.prepare import calibration_of, find_device, open_folder, open_model
from mergequant.quantizer.resolve import make_plan
from mergequant.quantizer.result import LinearResult, report_lines
from mergequant.quantizer.walk import walk_blocks
from mergequant.recipe import dump_recipe
from mergequant_vllm.format import CheckpointFormat, check_tensors
from mergequant_vllm.packing import pack

logger = logging.getLogger("mergequant")


def quantize(
    model: str | Path,
    output: str | Path,
    calibration: Sequence[str | Path],
    options: Options | None = None,
    *,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Path:
    """Quantize a Hugging Face model to INT4 weights and activations.

    A run that was killed or interrupted is continued by the same call: finished blocks are kept in
    `output`/.partial.

    Args:
        model: folder or hub id of a 16- or 32-bit model of a known architecture.
        output: folder to make; must not exist, be empty, or hold an unfinished run of the same
            model, text, options and releases.
        calibration: text files (.txt, .jsonl) or data set names; several are mixed.
        options: see `Options`.
        trust_remote_code: run code of the model's own that its tokenizer names, and copy its `*.py`
            into the checkpoint.
        progress: show a bar with block, loss and time left.

    Returns:
        `output`.

    Raises:
        InputError: the input is at fault. `output` is left as it was.
    """
    options = options or Options()
    folder, architecture = open_folder(model)
    for sentence in left_out(architecture, options, folder.config):
        logger.info("%s", sentence)
    blocks = int(folder.config["num_hidden_layers"])
    with Writer(Path(output), shards=blocks + 1) as writer, frozen_heap():
        trusted = trust_remote_code
        windows = calibration_of(folder, calibration, options, trust_remote_code=trusted)
        text = sha256_of(windows)
        device = find_device(options.device)
        here = options.model_copy(update={"device": device.type})
        # A plan for the largest that a pilot may choose: what it refuses is refused now.
        largest = Decision.largest(here, architecture, folder.config)
        reader, _, files = open_model(model, largest)
        whole = make_plan(architecture, reader.config, largest, text).checkpoint
        plain = 4 if any(x.dtype == "F32" for x in folder.headers.values()) else 2
        refuse_if_full(Path(output), checkpoint_bytes(whole, plain))
        refuse_if_short(needed_memory(architecture, reader.config, largest, *windows.shape), device)
        writer.begin(fingerprint(folder.config, files, options, text))
        if not writer.finished:  # else these very weights were checked before the first block
            reader.check_finite()
        kept, tensors = writer.decision()
        decision, channels = Decision.read(kept), Channels.of_tensors(tensors)
        if decision is None:
            decision, channels = decide(model, windows, options, device, progress)
        reader, _, _ = open_model(model, decision.applied_to(options), channels)
        decoder = Decoder(reader, architecture, device)
        plan = make_plan(architecture, reader.config, decision.applied_to(options), text)
        writer.remember(decision.model_dump(mode="json"), channels.tensors())
        measured = pilot_windows(windows, options) if decision.plain_loss is not None else None
        after = _quantize_blocks(decoder, windows, plan, writer, channels, measured, progress)
        writer.write_shard(blocks, _around_the_blocks(reader, architecture, plan.checkpoint))
        check_tensors(plan.checkpoint, writer.headers())
        contract = plan.checkpoint.model_dump(mode="json")
        before = decision.plain_loss
        seen = None if before is None or after is None else CalibrationLoss(before, after)
        writer.finish(reader, contract, dump_recipe(options), seen, code=trust_remote_code)
    if seen is not None:
        logger.info("%s", seen.sentence())
    return Path(output)


def _quantize_blocks(
    decoder: Decoder,
    windows: Tensor,
    plan: Plan,
    writer: Writer,
    channels: Channels,
    measured: Tensor | None,
    progress: bool,
) -> float | None:
    """Quantize and write each block that is not finished.

    Args:
        measured: the first of `windows`, on which the loss is taken behind the last block.

    Returns:
        the loss, nats a token; None: nothing is `measured`.
    """
    if measured is None and writer.finished == len(plan.blocks):
        return None
    losses: list[float] = []

    def measure(activations: Activations) -> None:
        if measured is not None:
            losses.append(decoder.loss(activations.batches, measured))

    walk = walk_blocks(
        decoder,
        plan,
        windows,
        finished=writer.finished,
        restore=partial(_restore, writer, plan),
        at_end=measure,
        progress=progress,
    )
    for block, results in walk:
        if block.number >= writer.finished:
            tensors = block_tensors(block, decoder.architecture, results)
            named = {block.name_of(name): tensor for name, tensor in tensors.items()}
            lines = report_lines(results, channels.outliers)
            if lines:
                lines[0]["peak_bytes"] = peak_bytes(decoder.device)
            writer.write_block(block.number, named, lines)
            del tensors, named
        del block, results  # else they would stay while the next block is quantized
    return losses[0] if losses else None


def _restore(writer: Writer, plan: Plan, block: Block) -> bool:
    """Put block `block.number` into place if it is finished."""
    if block.number >= writer.finished:
        return False
    prefix = f"{block.name}."
    stored = writer.read_block(block.number).items()
    within = {name.removeprefix(prefix): tensor for name, tensor in stored}
    load_stored(block, within, plan.blocks[block.number].formats)
    return True


def block_tensors(
    block: Block, architecture: Architecture, results: Sequence[LinearResult]
) -> dict[str, Tensor]:
    """What a checkpoint stores of a block, by name within it. Weights are packed here, once."""
    tensors = {
        name: tensor
        for name, tensor in block.source_tensors.items()
        if not name.endswith(architecture.ignored_suffixes)
    }
    for result in results:
        assert result.rounding is not None
        del tensors[f"{result.name}.weight"]
        tensors[f"{result.name}.weight_packed"] = pack(
            result.codes.cpu(), result.rounding.grid.bits
        )
        tensors |= {f"{result.name}.{suffix}": x for suffix, x in result.tensors().items()}
        tensors |= result.source.norm_tensors
    return tensors


def _around_the_blocks(
    reader: ModelReader, architecture: Architecture, checkpoint: CheckpointFormat
) -> Mapping[str, Tensor]:
    """What is stored beside the blocks: the embedding, the last norm, the head."""
    tensors = {}
    for name in outer_tensors(architecture, reader.config):
        owner = name.rpartition(".")[0]
        if owner in checkpoint.outer and name.endswith(".weight"):
            stored = quantize_head(reader.read(name))
            tensors.update({f"{owner}.{suffix}": tensor for suffix, tensor in stored.items()})
        else:
            tensors[name] = reader.read_in_source_dtype(name)
    return tensors

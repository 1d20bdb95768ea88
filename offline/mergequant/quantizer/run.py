"""The method on one page: a 16-bit model in, a mergequant checkpoint out, block by block."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from mergequant.calibration.text import (
    calibration_sources,
    calibration_windows,
    load_tokenizer,
    sha256_of,
    window_length,
)
from mergequant.errors import InputError
from mergequant.layers.in_block import load_stored
from mergequant.model.architecture import Architecture, outer_tensors, validate
from mergequant.model.architectures import find
from mergequant.model.decoder import Activations, Block, Decoder
from mergequant.model.reader import ModelReader, Reader, locate
from mergequant.model.rotated_reader import RotatedReader
from mergequant.model.untied_reader import UntiedReader
from mergequant.options import Options
from mergequant.output.checkpoint_plan import checkpoint_format
from mergequant.output.fingerprint import fingerprint
from mergequant.output.writer import Writer
from mergequant.quantizer.block import quantize_block
from mergequant.quantizer.choose_reconstruction import DECIDED, resolve_reconstruction
from mergequant.quantizer.head import BITS, quantize_head
from mergequant.quantizer.inputs.record import refuse_infinite
from mergequant.quantizer.memory.available import refuse_if_short
from mergequant.quantizer.memory.needed import needed_memory
from mergequant_vllm.format import CheckpointFormat, check_tensors

logger = logging.getLogger("mergequant")


def quantize(
    model: str | Path,
    output: str | Path,
    calibration: Sequence[str | Path],
    options: Options | None = None,
    *,
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
        progress: show a bar with block, loss and time left.

    Returns:
        `output`.

    Raises:
        InputError: the input is at fault. `output` is left as it was.
    """
    options = options or Options()
    if not options.exported:
        raise InputError(
            "No checkpoint holds --weights none or --mix-activations tensor: they are for "
            "`mergequant ablate`, which runs them in the reference engine."
        )
    reader, architecture, files = open_model(model, options)
    blocks = int(reader.config["num_hidden_layers"])
    with Writer(Path(output), shards=blocks + 1) as writer:
        windows = calibration_of(reader, calibration, options)
        text = sha256_of(windows)
        device = find_device(options.device)
        here = options.model_copy(update={"device": device.type})
        refuse_if_short(needed_memory(architecture, reader.config, here, *windows.shape), device)
        writer.begin(fingerprint(reader.config, files, options, text))
        if not writer.finished:  # else these very weights were checked before the first block
            reader.check_finite()
        decoder = Decoder(reader, architecture, device)
        decided = writer.decision() or _decide(decoder, windows, options, progress)
        options = options.model_copy(update=decided)
        contract = checkpoint_format(reader.config, architecture, options, text)
        writer.remember(decided)
        _quantize_blocks(decoder, windows, options, contract, writer, progress)
        writer.write_shard(blocks, _around_the_blocks(reader, architecture, contract))
        check_tensors(contract, writer.headers())
        writer.finish(reader, contract.model_dump(mode="json"))
    return Path(output)


def _around_the_blocks(
    reader: ModelReader, architecture: Architecture, contract: CheckpointFormat
) -> dict[str, Tensor]:
    """What is stored beside the blocks: the embedding, the last norm, the head."""
    tensors = {}
    for name in outer_tensors(architecture, reader.config):
        owner = name.rpartition(".")[0]
        if owner in contract.outer:
            found = quantize_head(reader.read(name))
            tensors.update({f"{owner}.{suffix}": tensor for suffix, tensor in found.items()})
        else:
            tensors[name] = reader.read_in_source_dtype(name)
    return tensors


def _decide(decoder: Decoder, windows: Tensor, options: Options, progress: bool) -> dict[str, Any]:
    """What the options leave to be measured: their fields, decided."""
    found = resolve_reconstruction(decoder, windows, options, progress)
    return {name: getattr(found, name) for name in DECIDED}


def open_model(model: str | Path, options: Options) -> tuple[ModelReader, Architecture, list[Path]]:
    """A 16-bit model as it will be quantized, rotated and untied or not; its table; its files."""
    folder = Reader(locate(model))
    folder.refuse_quantized()
    architecture = find(folder.config.get("model_type"))
    validate(architecture, folder.config, folder.shapes())
    reader: ModelReader = folder
    if options.head_bits == BITS and reader.config.get("tie_word_embeddings", False):
        reader = UntiedReader(reader, architecture)
    if options.rotation != "none":
        reader = RotatedReader(
            reader, architecture, options.rotation, options.seed, most=options.hadamard_block
        )
    return reader, architecture, folder.weight_files()


def calibration_of(
    reader: ModelReader, calibration: Sequence[str | Path], options: Options
) -> Tensor:
    """Token ids int64 [samples, length]: as many windows as any use of them asks for.

    Raises:
        InputError: there is no text, or too little.
    """
    sources = calibration_sources(calibration)
    context = reader.config.get("max_position_embeddings")
    samples = options.statistics_samples
    if options.weights == "gptq":
        samples = max(samples, options.gptq_samples)
    if options.compensated:
        samples = max(samples, options.compensation_samples)
    return calibration_windows(
        sources,
        load_tokenizer(reader.folder),
        samples=samples,
        length=window_length(options.sequence_length, context),
        seed=options.seed,
    )


def _quantize_blocks(
    decoder: Decoder,
    windows: Tensor,
    options: Options,
    contract: CheckpointFormat,
    writer: Writer,
    progress: bool,
) -> None:
    """Each block: calibrate on what the quantized blocks before it emit, quantize, write it."""
    if writer.finished == contract.blocks:
        return
    architecture = decoder.architecture
    activations = embed(decoder, windows, options)
    with progress_bar(contract, options, writer.finished, progress) as bar:
        for number in range(contract.blocks):
            bar.set_description(f"Block {number + 1}/{contract.blocks}")
            with decoder.block(number) as block:
                targets = [block.forward(hidden) for hidden in activations.exact]
                prefix = f"{block.name}."
                if number < writer.finished:
                    stored = writer.read_block(number)
                else:
                    found, report = quantize_block(
                        block, architecture, activations, targets, options, contract.linears, bar
                    )
                    stored = {f"{prefix}{name}": tensor for name, tensor in found.items()}
                    writer.write_block(number, stored, report)
                within = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
                load_stored(block, within, contract.linears, decoder.device)
                go_behind(block, activations, targets)


def go_behind(block: Block, activations: Activations, targets: list[Tensor]) -> None:
    """Advance `activations` through a quantized block; `targets` is what the plain one emits.

    Raises:
        InputError: either is not finite.
    """
    activations.advance(block.forward, targets)
    for hidden in (*activations.batches, *activations.exact):
        refuse_infinite(hidden, f"The output of {block.name}")


def embed(decoder: Decoder, windows: Tensor, options: Options) -> Activations:
    """The first block's input, for each of its uses."""
    compensation = options.compensation_samples if options.compensated else 0
    return decoder.embed(windows, options.statistics_samples, options.gptq_samples, compensation)


def progress_bar(
    contract: CheckpointFormat, options: Options, finished: int, shown: bool
) -> "tqdm[NoReturn]":
    """A bar over linears, and epochs of the compensation."""
    each = len(contract.linears)
    if options.compensated:
        each += options.compensation_epochs
    total, done = contract.blocks * each, finished * each
    return tqdm(total=total, initial=done, unit="step", disable=not shown)


def find_device(wanted: str) -> torch.device:
    """The device that an option names; InputError if it cannot be used."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"Device {wanted!r} cannot be used here: give --device cpu.") from error
    return device

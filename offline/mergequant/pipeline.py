"""The method on one page: a 16-bit model in, a mergequant checkpoint out, block by block."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mergequant.architecture import Architecture, outer_tensors, validate
from mergequant.architectures import find
from mergequant.checkpoint import Reader, Writer, locate
from mergequant.contract import checkpoint_format
from mergequant.corpus import (
    calibration_windows,
    load_tokenizer,
    read_source,
    sha256_of,
    window_length,
)
from mergequant.decoder import Activations, Block, Decoder
from mergequant.errors import InputError
from mergequant.fingerprint import fingerprint
from mergequant.options import Options
from mergequant.rotated import RotatedReader
from mergequant.stage import quantize_stage
from mergequant.stored_block import load_stored
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
    reader = Reader(locate(model))
    reader.refuse_quantized()
    architecture = find(reader.config.get("model_type"))
    validate(architecture, reader.config, reader.shapes())
    files = reader.weight_files()
    if options.rotation != "none":
        reader = RotatedReader(
            reader, architecture, options.rotation, options.seed, most=options.hadamard_block
        )
    blocks = int(reader.config["num_hidden_layers"])
    with Writer(Path(output), shards=blocks + 1) as writer:
        windows = _calibration(reader, calibration, options)
        contract = checkpoint_format(reader.config, architecture, options, sha256_of(windows))
        writer.begin(fingerprint(reader.config, files, contract))
        if not writer.finished:  # else these very weights were checked before the first block
            reader.check_finite()
        _quantize_blocks(reader, architecture, windows, options, contract, writer, progress)
        names = outer_tensors(architecture, reader.config)
        outer = {name: reader.read_in_source_dtype(name) for name in names}
        writer.write_shard(blocks, outer)
        check_tensors(contract, writer.headers())
        writer.finish(reader, contract.model_dump(mode="json"))
    return Path(output)


def _calibration(reader: Reader, calibration: Sequence[str | Path], options: Options) -> Tensor:
    if not calibration:
        raise InputError("No calibration text: give --calibration FILE (.txt or .jsonl).")
    sources = [read_source(str(name)) for name in calibration]
    context = reader.config.get("max_position_embeddings")
    samples = options.statistics_samples
    if options.weights == "gptq":
        samples = max(samples, options.gptq_samples)
    return calibration_windows(
        sources,
        load_tokenizer(reader.folder),
        samples=samples,
        length=window_length(options.sequence_length, context),
        seed=options.seed,
    )


def _quantize_blocks(
    reader: Reader,
    architecture: Architecture,
    windows: Tensor,
    options: Options,
    contract: CheckpointFormat,
    writer: Writer,
    progress: bool,
) -> None:
    """Each block: calibrate on what the quantized blocks before it emit, quantize, write it."""
    if writer.finished == contract.blocks:
        return
    device = _device(options.device)
    decoder = Decoder(reader, architecture, device)
    activations = decoder.embed(windows, options.statistics_samples, options.gptq_samples)
    linears = len(architecture.linears)
    total, done = contract.blocks * linears, writer.finished * linears
    with tqdm(total=total, initial=done, unit="linear", disable=not progress) as bar:
        for number in range(contract.blocks):
            bar.set_description(f"Block {number + 1}/{contract.blocks}")
            prefix = f"{architecture.block.format(block=number)}."
            with decoder.block(number) as block:
                if number < writer.finished:
                    stored = writer.read_block(number)
                else:
                    found, report = _quantize_block(block, architecture, activations, options, bar)
                    stored = {f"{prefix}{name}": tensor for name, tensor in found.items()}
                    lines = [{**line, "linear": f"{prefix}{line['linear']}"} for line in report]
                    writer.write_block(number, stored, lines)
                within = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
                load_stored(block, within, contract.linears, device)
                for index, hidden in enumerate(activations.batches):
                    activations.batches[index] = block.forward(hidden)  # the old one is freed


def _quantize_block(
    block: Block, architecture: Architecture, activations: Activations, options: Options, bar: Any
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """What to store of a block, by name within it, and its lines of the report."""
    tensors, report = dict(block.stored), []
    for stage in architecture.stages():
        for result in quantize_stage(block, stage, activations, options):
            report.append({"linear": result.linear, **result.report})
            bar.set_postfix(loss=f"{result.loss:.2e}")
            bar.update()
            tensors.pop(f"{result.linear}.weight")
            tensors.update(result.tensors)
    return dict(_without_ignored(tensors, architecture)), report


def _without_ignored(
    tensors: Mapping[str, Tensor], architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if not name.endswith(architecture.ignored_suffixes):
            yield name, tensor


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"Device {wanted!r} cannot be used here: give --device cpu.") from error
    return device

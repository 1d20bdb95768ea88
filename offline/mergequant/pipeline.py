"""The method on one page: a 16-bit model in, a mergequant checkpoint out, block by block."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

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
from mergequant.decoder import Decoder
from mergequant.errors import InputError
from mergequant.options import Options
from mergequant.stage import LinearResult, quantize_stage
from mergequant_vllm.format import check_tensors

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

    Args:
        model: folder or hub id of a 16- or 32-bit model of a known architecture.
        output: folder to make; must not exist or be empty.
        calibration: text files (.txt, .jsonl) or data set names; several are mixed.
        options: see `Options`.
        progress: show a bar with block, loss and time left.

    Returns:
        `output`.

    Raises:
        InputError: the input is at fault. Nothing is left in `output`.
    """
    options = options or Options()
    reader = Reader(locate(model))
    reader.refuse_quantized()
    architecture = find(reader.config.get("model_type"))
    validate(architecture, reader.config, reader.shapes())
    blocks = int(reader.config["num_hidden_layers"])
    with Writer(Path(output), shards=blocks + 1) as writer:
        windows = _calibration(reader, calibration, options)
        reader.check_finite()
        _quantize_blocks(reader, architecture, windows, options, writer, progress)
        outer = {name: reader.read(name) for name in outer_tensors(architecture, reader.config)}
        writer.write_shard(blocks, outer)
        contract = checkpoint_format(reader.config, architecture, options, sha256_of(windows))
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
    writer: Writer,
    progress: bool,
) -> None:
    """Each block: calibrate on what the quantized blocks before it emit, quantize, write it."""
    device = _device(options.device)
    decoder = Decoder(reader, architecture, device)
    activations = decoder.embed(windows, options.statistics_samples, options.gptq_samples)
    blocks = int(reader.config["num_hidden_layers"])
    total = blocks * len(architecture.linears)
    with tqdm(total=total, desc="Quantizing", unit="linear", disable=not progress) as bar:
        for number in range(blocks):
            prefix = architecture.block.format(block=number)
            with decoder.block(number) as block:
                tensors = dict(block.stored)
                for stage in architecture.stages():
                    for result in quantize_stage(block, stage, activations, options):
                        _record(writer, f"{prefix}.{result.linear}", result)
                        bar.set_postfix(block=f"{number + 1}/{blocks}", loss=f"{result.loss:.2e}")
                        bar.update()
                        tensors.pop(f"{result.linear}.weight")
                        tensors.update(result.tensors)
                for index, hidden in enumerate(activations.batches):
                    activations.batches[index] = block.forward(hidden)  # the old one is freed
            kept = _without_ignored(tensors, architecture)
            writer.write_shard(number, {f"{prefix}.{key}": value for key, value in kept})


def _without_ignored(
    tensors: Mapping[str, Tensor], architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if not name.endswith(architecture.ignored_suffixes):
            yield name, tensor


def _record(writer: Writer, name: str, result: LinearResult) -> None:
    writer.report({"linear": name, **result.report})


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"Device {wanted!r} cannot be used here: give --device cpu.") from error
    return device

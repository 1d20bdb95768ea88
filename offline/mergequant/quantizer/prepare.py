"""What a run begins with: the model as it will be quantized, the text, the device."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mergequant.calibration.sources import calibration_sources
from mergequant.calibration.text import calibration_windows, window_length
from mergequant.calibration.tokenizer import load_tokenizer, refuse_unknown_tokens
from mergequant.errors import InputError
from mergequant.model.architecture import Architecture
from mergequant.model.architectures import find
from mergequant.model.channels import Channels
from mergequant.model.equalized_reader import EqualizedReader
from mergequant.model.hugging_face_config import load_config, refuse_unserved, settle_head
from mergequant.model.reader import ModelReader, Reader, locate
from mergequant.model.rotated_reader import RotatedReader
from mergequant.model.shapes import validate, widths
from mergequant.model.untied_reader import UntiedReader
from mergequant.options import Options
from mergequant.quantizer.forms import quantizes_head
from mergequant.quantizer.plan import Samples
from mergequant.quantizer.resolve import samples_of


def open_model(
    model: str | Path, options: Options, channels: Channels | None = None
) -> tuple[ModelReader, Architecture, list[Path]]:
    """A 16-bit model as it will be quantized, with its weights transformed; its table; its files.

    Args:
        channels: what calibration says of them; None: nothing.
    """
    channels = channels or Channels()
    folder, architecture = open_folder(model)
    reader: ModelReader = folder
    head_quantized = quantizes_head(architecture, options)
    if head_quantized and folder.config.get("classifier_from_token"):
        raise InputError(
            "config.json has classifier_from_token: servers read the classes from rows of the "
            "head, which must stay as it is: add --head-bits 16."
        )
    if head_quantized and reader.config.get("tie_word_embeddings", False):
        reader = UntiedReader(reader, architecture)
    if channels.scales:
        reader = EqualizedReader(reader, architecture, channels.scales)
    rotation = options.decided_rotation
    if rotation != "none":
        reader = RotatedReader(
            reader,
            architecture,
            rotation,
            options.seed,
            most=options.hadamard_block,
            heads=options.mix_heads,
            order=channels.order,
            residual_only=options.activations == "fully_static",
            unquantized=options.ignores,
        )
    return reader, architecture, folder.weight_files()


def open_folder(model: str | Path) -> tuple[Reader, Architecture]:
    """The 16-bit source model and its table; raises InputError if that does not fit."""
    folder = Reader(locate(model))
    folder.refuse_quantized()
    architecture = find(folder.config.get("model_type"))
    load_config(folder.folder)
    settle_head(folder, architecture)
    refuse_unserved(architecture, folder.config)
    validate(architecture, folder.config, folder.shapes())
    return folder, architecture


def calibration_of(
    reader: ModelReader,
    calibration: Sequence[str | Path],
    options: Options,
    *,
    trust_remote_code: bool = False,
) -> Tensor:
    """Token ids int64 [samples, length]: as many windows as any use of them asks for.

    Args:
        trust_remote_code: run code of the model's own that its tokenizer names.

    Raises:
        InputError: there is no text, too little, or of tokens that the model does not know.
    """
    sources = calibration_sources(calibration)
    samples, length = windows_of(reader, options)
    tokenizer = load_tokenizer(reader.folder, trust_remote_code=trust_remote_code)
    windows = calibration_windows(
        sources,
        tokenizer,
        samples=max(samples.statistics, samples.hessians, samples.training),
        length=length,
        seed=options.seed,
    )
    refuse_unknown_tokens(windows, tokenizer, widths(reader.config)["vocabulary"])
    return windows


def windows_of(reader: ModelReader, options: Options) -> tuple[Samples, int]:
    """How many calibration windows each use of them takes, and their length in tokens."""
    length = window_length(options.sequence_length, reader.config.get("max_position_embeddings"))
    architecture = find(reader.config.get("model_type"))
    return samples_of(options, architecture, reader.config, length), length


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

"""What the inputs of a 16-bit model's norm-fed linears look like: the paper's Figures 2c, 5 and 6.

One block is in memory at a time; nothing is quantized.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergequant.calibration.statistics import ChannelMagnitudes
from mergequant.methods.migrate import activation_steps, migrate_weight
from mergequant.methods.reconstruct import fold_columns, reconstruct, threshold
from mergequant.model.architecture import Architecture, Readers
from mergequant.model.block import Block
from mergequant.model.decoder import Decoder
from mergequant.model.reader import ModelReader
from mergequant.model.shapes import paper_alpha
from mergequant.options import Options
from mergequant.output.durable_files import write_durably
from mergequant.quantizer.inputs.record import stacked_weights
from mergequant.quantizer.prepare import calibration_of, find_device
from mergequant_vllm.rounding import largest_code


@dataclass(frozen=True)
class Survey:
    """Statistics of the inputs of norm-fed linears.

    Attributes:
        largest: float32 [blocks, n], max |X_k| over the calibration tokens, by the space.
        space: of the folded columns below: where a step exceeds Eq. 6's threshold the most.
        block: of the same, counted from 0.
        before: float32 [n], max_j |s_k W_jk| of each migrated column (Eq. 5).
        after: float32 [K], the same of the reconstructed columns, which add up to those.
    """

    largest: dict[str, Tensor]
    space: str
    block: int
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class _Columns:
    excess: float
    space: str
    block: int
    before: Tensor
    after: Tensor


def survey(
    reader: ModelReader,
    architecture: Architecture,
    calibration: Sequence[str | Path],
    options: Options,
    progress: bool = True,
) -> Survey | None:
    """Run the model on `options.statistics_samples` windows and look at every norm's output.

    None where no linear of the architecture reads a norm's.
    """
    norm_fed = [readers for readers in architecture.readers() if readers.norm is not None]
    if not norm_fed:
        return None
    decoder = Decoder(reader, architecture, find_device(options.device))
    windows = _windows(reader, calibration, options)
    batches = decoder.embed(windows, len(windows), 0).batches
    alpha = options.alpha if isinstance(options.alpha, float) else paper_alpha(reader.config)
    largest: dict[str, list[Tensor]] = {readers.space: [] for readers in norm_fed}
    most: _Columns | None = None
    for block in decoder.walk(batches, int(reader.config["num_hidden_layers"]), "Survey", progress):
        for readers in norm_fed:
            magnitudes = _magnitudes(block, readers, batches)
            largest[readers.space].append(magnitudes.largest.to("cpu", torch.float32))
            columns = _columns(block, readers, magnitudes, alpha, options)
            if most is None or columns.excess > most.excess:
                most = columns
    assert most is not None  # a model has a block
    rows = {space: torch.stack(vectors) for space, vectors in largest.items()}
    return Survey(rows, most.space, most.block, most.before, most.after)


def kept_survey(
    file: Path,
    reader: ModelReader,
    architecture: Architecture,
    calibration: Sequence[str | Path],
    options: Options,
    progress: bool = True,
) -> Survey | None:
    """The survey in `file` if it was made with these options, else a new one, kept there."""
    made_with = options.model_dump_json()
    if file.exists():
        kept = load_file(file)
        if bytes(kept.pop("options").tolist()).decode() == made_with:
            return _unpacked(kept)
    survey_made = survey(reader, architecture, calibration, options, progress)
    if survey_made is None:
        return None
    tensors = _packed(survey_made) | {
        "options": torch.tensor(list(made_with.encode()), dtype=torch.uint8)
    }
    write_durably(file, lambda path: save_file(tensors, path))
    return survey_made


def _packed(survey_made: Survey) -> dict[str, Tensor]:
    spaces = list(survey_made.largest)
    where = torch.tensor([spaces.index(survey_made.space), survey_made.block])
    largest = {f"largest.{space}": tensor for space, tensor in survey_made.largest.items()}
    return {**largest, "where": where, "before": survey_made.before, "after": survey_made.after}


def _unpacked(kept: dict[str, Tensor]) -> Survey:
    start = "largest."
    largest = {x.removeprefix(start): kept[x] for x in kept if x.startswith(start)}
    space, block = kept["where"].tolist()
    return Survey(largest, list(largest)[space], block, kept["before"], kept["after"])


def _windows(reader: ModelReader, calibration: Sequence[str | Path], options: Options) -> Tensor:
    """Those that steps are calibrated on, and no more."""
    least = options.model_copy(update={"weights": "rtn", "compensation_rank": 0})
    return calibration_of(reader, calibration, least)


def _magnitudes(block: Block, readers: Readers, batches: list[Tensor]) -> ChannelMagnitudes:
    magnitudes = ChannelMagnitudes()
    block.observe(readers.linears[0].name, batches, magnitudes.add)
    return magnitudes


def _columns(
    block: Block, readers: Readers, magnitudes: ChannelMagnitudes, alpha: float, options: Options
) -> _Columns:
    """The readers' stacked weights as QSM makes them, before and after reconstruction."""
    weight = stacked_weights(block, [x.name for x in readers.linears]).to(torch.float64)
    step = activation_steps(
        magnitudes.largest, torch.ones_like(magnitudes.largest), largest_code(options.static_bits)
    )
    shape = reconstruct(
        step,
        step,
        magnitudes.energy,
        alpha,
        mode="prune" if options.reconstruction == "prune" else "pad",
        tile=1,
    )
    excess = float(step.max()) / threshold(step, alpha)
    before, after = migrate_weight(weight, step), fold_columns(weight, step, shape)
    return _Columns(excess, readers.space, block.number, _height(before), _height(after))


def _height(weight: Tensor) -> Tensor:
    return weight.abs().amax(dim=0).to("cpu", torch.float32)

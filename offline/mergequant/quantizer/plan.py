"""What a run does, decided: each step gets its own part of the plan, and no step sees the options.

`resolve` makes a plan of the options; nothing in it is left to be decided but what the activations
decide.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mergequant.methods.weights import Search
from mergequant.quantizer.inputs.record import InputPlan
from mergequant_vllm.format import CheckpointFormat, LinearFormat, WeightForm


@dataclass(frozen=True)
class WeightPlan:
    """How one weight becomes codes.

    Attributes:
        form: how it is stored.
        search: how its steps are chosen, see `methods.weights`.
        rounding: `gptq` (paper 5), or `rtn`, round to nearest.
        damping: added to the Hessian's diagonal, as a fraction of its mean.
        gptq_block: columns that GPTQ updates at once.
        corrected: for what rounding the input takes away, see `methods.correct`.
    """

    form: WeightForm
    search: Search
    rounding: Literal["gptq", "rtn"]
    damping: float
    gptq_block: int
    corrected: bool


@dataclass(frozen=True)
class ReadersPlan:
    """The linears of a block that read one input and are quantized.

    Attributes:
        input: how that is calibrated.
        weights: by the linear's name within the block; None: the weight stays in floating point, a
            baseline that no checkpoint holds.
    """

    input: InputPlan
    weights: Mapping[str, WeightPlan | None]

    @property
    def corrected(self) -> bool:
        """Whether all of the weights are."""
        return all(x is not None and x.corrected for x in self.weights.values())


@dataclass(frozen=True)
class TrainingPlan:
    """The compensation (paper 4.3).

    Attributes:
        rank: of the low-rank matrices; None: each element is trained by itself.
        epochs: most passes over the windows.
        samples: windows of text to train on, some of them held out.
        learning_rate: of AdamW, in weight steps; decays linearly to 0.
        seed: draws the matrices and the order of the windows.
    """

    rank: int | None
    epochs: int
    samples: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class BlockPlan:
    """One block: what reads what, in order of execution, and how it is stored.

    Attributes:
        readers: those of which something is quantized.
        formats: how each quantized linear is stored, by name within the block.
        training: None: nothing is trained.
    """

    readers: tuple[ReadersPlan, ...]
    formats: Mapping[str, LinearFormat]
    training: TrainingPlan | None

    @property
    def steps(self) -> int:
        """Steps of the progress bar: linears, and epochs of the training."""
        epochs = 0 if self.training is None or not self.formats else self.training.epochs
        return len(self.formats) + epochs


@dataclass(frozen=True)
class Samples:
    """How many windows of text each use takes, from the first on."""

    statistics: int
    hessians: int
    training: int


@dataclass(frozen=True)
class Plan:
    """A whole run.

    Attributes:
        blocks: of each block, in order.
        samples: windows of text.
        checkpoint: what is written.
    """

    blocks: tuple[BlockPlan, ...]
    samples: Samples
    checkpoint: CheckpointFormat

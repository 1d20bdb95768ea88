"""Which kernels serve a linear by default, per compute capability: one table.

Each row lists kernels in order of preference; the first that does not refuse runs, and the log says
which and why. `evidence` names the measurement behind the order, or says that there is none.
"""

from enum import Enum
from typing import NamedTuple

from mergequant_vllm.kernels.linear.spec import LinearSpec


class Kind(Enum):
    """What the weights and activations of a linear ask of a kernel."""

    INT4 = "4-bit weights per channel, 4-bit activations"
    INT4_BY_INT8 = "4-bit weights per channel, 8-bit activations"
    OTHER = "3- or 8-bit weights, several steps an output channel, or zero points"


def kind_of(spec: LinearSpec) -> Kind:
    """The row of the table that `spec` belongs to."""
    zero_points = spec.zero_points or spec.token_zero_points
    if spec.weight_bits != 4 or spec.spans is not None or zero_points:
        return Kind.OTHER
    return Kind.INT4 if spec.activation_bits == 4 else Kind.INT4_BY_INT8


class Row(NamedTuple):
    """Kernels for capabilities `oldest` to `newest`, both included, see `kernels.capability`."""

    oldest: int
    newest: int
    kind: Kind
    kernels: tuple[str, ...]
    evidence: str


CPU = ("cpu-int4", "cpu-fp32", "reference")

UNMEASURED = "unmeasured"
GPUS: tuple[Row, ...] = (
    # Turing: INT4 tensor cores; Marlin's and Triton's INT8 products need 8.0.
    Row(75, 79, Kind.INT4, ("humming-int4", "humming-int8", "reference"), UNMEASURED),
    Row(75, 79, Kind.INT4_BY_INT8, ("humming-int8", "reference"), UNMEASURED),
    Row(75, 79, Kind.OTHER, ("humming-int8", "reference"), UNMEASURED),
    # Ampere and Ada: INT4 tensor cores at twice the INT8 rate.
    Row(80, 89, Kind.INT4, ("humming-int4", "marlin-int8", "triton", "reference"), UNMEASURED),
    Row(80, 89, Kind.INT4_BY_INT8, ("marlin-int8", "triton", "reference"), UNMEASURED),
    Row(80, 89, Kind.OTHER, ("humming-int8", "triton", "reference"), UNMEASURED),
    # Hopper: no INT4 tensor cores. Marlin is precompiled; Humming's wgmma may be faster.
    Row(90, 99, Kind.INT4, ("marlin-int8", "humming-int8", "triton", "reference"), UNMEASURED),
    Row(90, 99, Kind.INT4_BY_INT8, ("marlin-int8", "triton", "reference"), UNMEASURED),
    Row(90, 99, Kind.OTHER, ("humming-int8", "triton", "reference"), UNMEASURED),
    # Blackwell.
    Row(100, 129, Kind.INT4, ("marlin-int8", "triton", "reference"), UNMEASURED),
    Row(100, 129, Kind.INT4_BY_INT8, ("marlin-int8", "triton", "reference"), UNMEASURED),
    Row(100, 129, Kind.OTHER, ("humming-int8", "triton", "reference"), UNMEASURED),
)

# GPUs that no row knows: newer than the table, or not NVIDIA's.
UNKNOWN_GPU = ("triton", "reference")


def default_kernels(spec: LinearSpec) -> tuple[str, ...]:
    """Names of the kernels for `spec`, best first."""
    if spec.device == "cpu":
        return CPU
    for row in GPUS:
        known = spec.capability is not None and row.oldest <= spec.capability <= row.newest
        if known and row.kind is kind_of(spec):
            return row.kernels
    return UNKNOWN_GPU

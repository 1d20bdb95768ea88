"""Count the 4-bit weight codes that differ between two checkpoints of one model: one line.

    python -m benchmarks.gpu.differing_codes CHECKPOINT OTHER

Products on a GPU are summed in another order than on a CPU. Of what is nearly halfway between two
codes some goes to the other one, and GPTQ carries the difference on to later columns. Exit status
1: the two do not hold the same linears.
"""

import sys
from pathlib import Path

from mergequant.model.reader import Reader
from mergequant_vllm.packing import unpack

PACKED = ".weight_packed"
BITS = 4


def count(first: Path, second: Path) -> tuple[int, int]:
    """Return how many codes differ, and how many there are.

    Raises:
        SystemExit: the checkpoints do not hold the same quantized linears.
    """
    readers = Reader(first), Reader(second)
    packed = [{name for name in x.headers if name.endswith(PACKED)} for x in readers]
    if packed[0] != packed[1]:
        alone = sorted(packed[0] ^ packed[1])
        raise SystemExit(f"Only one of the two has {alone[0]}: they were quantized differently.")
    differing = total = 0
    for name in sorted(packed[0]):
        words = [x.read_in_source_dtype(name) for x in readers]
        if words[0].shape != words[1].shape:
            raise SystemExit(f"{name} has another shape in the other checkpoint.")
        columns = words[0].shape[-1] * (8 * words[0].element_size() // BITS)
        codes = [unpack(x, BITS, columns) for x in words]
        differing += int((codes[0] != codes[1]).sum())
        total += codes[0].numel()
    return differing, total


def main() -> None:
    """Print the count."""
    differing, total = count(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{differing} of {total} codes differ ({differing / max(total, 1):.3%})")


if __name__ == "__main__":
    main()

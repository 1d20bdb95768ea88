"""Quantize a model from Python, as `mergequant quantize` does from the shell.

python examples/quantize.py MODEL OUTPUT CALIBRATION_FILE [CALIBRATION_FILE ...]
"""

import sys

from mergequant import InputError, Options, quantize
from mergequant.evaluate.checkpoint_contents import as_table, inspect_checkpoint


def main(model: str, output: str, *calibration: str) -> None:
    options = Options(reconstruction="auto", compensation_rank=64, seed=0)  # the defaults
    folder = quantize(model, output, calibration, options)
    print(as_table(inspect_checkpoint(folder)))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))

"""Triton programs are decorated as their modules are imported: interpreted, or compiled."""

import sys


def forget_programs() -> None:
    """Have the next launch import the programs again, under the environment that is then."""
    for name in list(sys.modules):
        if name.startswith("mergequant_vllm.") and name.endswith(".program"):
            package, _, last = name.rpartition(".")
            del sys.modules[name]
            vars(sys.modules[package]).pop(last, None)

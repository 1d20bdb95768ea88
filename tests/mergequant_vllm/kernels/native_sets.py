"""The instruction sets that tests of the native kernels go through."""

from mergequant_vllm.kernels import native_library as native


def runnable() -> list[str]:
    """Those that were compiled in and run on this CPU."""
    return list(native.instruction_sets()) if native.LIBRARY.is_file() else []

"""The native CPU kernels' library (csrc/mergequant.h): found, loaded once, called through ctypes.

Without it, because no compiler built it or none of its instruction sets runs here, the linears run
in PyTorch (`linear.cpu.fp32`). The library has no OpenMP of its own: its threads are those of the
OpenMP that PyTorch loaded, which vLLM has bound to cores.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "libmergequant.so"
ISA_VARIABLE = "MERGEQUANT_CPU_ISA"
# Element types as mergequant.h numbers them.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

logger = logging.getLogger("vllm.mergequant")

_PORTABLE = "portable"
_pointer, _long, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "mq_linear_pack": (_int, _pointer, _long, _long, _int, _pointer),
    "mq_linear": (
        *(_int, _pointer, _long, _long, _pointer, _pointer, _pointer, _pointer, _pointer),
        *(_pointer, _pointer, _pointer, _int, _long, _long, _pointer, _long, _int, _int),
    ),
    "mq_token_quant": (
        *(_int, _pointer, _int, _long, _long, _long, _pointer, _int, _long, _pointer, _long),
        *(_pointer, _pointer),
    ),
    "mq_static_round": (
        *(_int, _pointer, _int, _long, _long, _long, _pointer, _pointer, _int, _pointer, _long),
        _long,
    ),
    "mq_hadamard": (_int, _pointer, _pointer, _long, _long, _long),
    "mq_mix_heads": (_int, _pointer, _int, _long, _long, _long, _long, _pointer, _pointer),
}
_ERRORS = {
    1: "the instruction set does not run on this CPU",
    2: "an argument is out of range",
    3: "there is not enough memory",
}


def refusal() -> str | None:
    """Why the native kernels do not run here, as a clause; None if they do."""
    try:
        current_isa()
    except NativeError as error:
        return str(error)
    return None


class NativeError(RuntimeError):
    """The library cannot be used, or refused a call."""


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library; raises NativeError if there is none."""
    if not LIBRARY.is_file():
        raise NativeError(
            "the native kernels were not built: install a C++ compiler (g++ or clang++) and then "
            "this package again, with MERGEQUANT_NATIVE=require, under which pip says why it fails"
        )
    _share_openmp()
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise NativeError(
            f"the native kernels cannot be loaded ({error}): build them here, by installing this "
            "package from its source"
        ) from error
    for name, types in _SIGNATURES.items():
        getattr(loaded, name).argtypes = types
    loaded.mq_linear_bytes.argtypes = (_int, _long, _long, _int)
    loaded.mq_linear_bytes.restype = _long
    loaded.mq_isa_name.restype = ctypes.c_char_p
    loaded.mq_torch_function_name.restype = ctypes.c_char_p
    loaded.mq_register_operators.argtypes = (ctypes.POINTER(_pointer),)
    return loaded


def _share_openmp() -> None:
    """Let the library find the OpenMP that PyTorch has loaded, whichever that is."""
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    names = ("libgomp", "libiomp5", "libomp")
    files = {line.split(maxsplit=5)[-1] for line in mapped if "/lib" in line}
    for file in sorted(files):
        if Path(file).name.startswith(names):
            ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL)


def instruction_sets() -> dict[str, int]:
    """Those that were compiled in and run on this CPU, slowest first, with their numbers."""
    loaded = library()
    return {
        loaded.mq_isa_name(number).decode(): number
        for number in range(loaded.mq_isa_count())
        if loaded.mq_isa_runs(number)
    }


_override: int | None = None


def current_isa() -> int:
    """The instruction set that runs: the fastest, or the one that MERGEQUANT_CPU_ISA names.

    Raises:
        NativeError: there is none, or the one that is named does not run here.
    """
    return _default_isa() if _override is None else _override


@functools.cache
def _default_isa() -> int:
    sets = instruction_sets()
    name = _choose(sets)
    logger.info("The native CPU kernels run on %s", name)
    return sets[name]


def _choose(sets: dict[str, int]) -> str:
    named = os.environ.get(ISA_VARIABLE)
    if named:
        if named not in sets:
            raise NativeError(
                f"{ISA_VARIABLE}={named!r} does not run here: choose one of {', '.join(sets)}"
            )
        return named
    fastest = list(sets)[-1]
    if fastest == _PORTABLE:
        raise NativeError(
            "this CPU has none of AVX2, AVX-512 and the NEON dot product "
            f"({ISA_VARIABLE}={_PORTABLE} runs the native kernels nevertheless)"
        )
    return fastest


def isa_name() -> str:
    """Name of the current instruction set."""
    return str(library().mq_isa_name(current_isa()).decode())


@contextmanager
def using(isa: str) -> Iterator[None]:
    """Run another instruction set in this block, for comparisons; packed weights are its own."""
    global _override
    before, _override = _override, instruction_sets()[isa]
    _use_in_operators()
    try:
        yield
    finally:
        _override = before
        _use_in_operators()


def call(name: str, *arguments: float | int | None) -> None:
    """Call a function of the library with the current instruction set; raises NativeError."""
    code = getattr(library(), name)(current_isa(), *arguments)
    if code:
        raise NativeError(f"{name}: {_ERRORS.get(code, f'error {code}')}.")


@functools.cache
def register_operators() -> bool:
    """Let PyTorch call the operators that the library has itself, without Python in between.

    Returns:
        False where this PyTorch lacks a function of its C interface: the operators then stay
        Python's, a few microseconds slower for each call.
    """
    loaded = library()
    names = [loaded.mq_torch_function_name(i) for i in range(loaded.mq_torch_function_count())]
    addresses = (_pointer * len(names))(*(_torch_function(name.decode()) for name in names))
    _use_in_operators()
    registered = bool(loaded.mq_register_operators(addresses) == 0)
    if not registered:
        logger.info("PyTorch %s does not take native operators", torch.__version__)
    return registered


def _torch_function(name: str) -> int | None:
    """Address of a function of PyTorch's C interface."""
    file = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), None)
    if file is None:
        return None
    function = getattr(ctypes.CDLL(str(file)), name, None)
    return None if function is None else ctypes.cast(function, _pointer).value


def _use_in_operators() -> None:
    """Let the library's own operators run the current instruction set."""
    library().mq_use_isa(current_isa())

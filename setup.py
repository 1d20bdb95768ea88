"""Builds the native CPU kernels (mergequant_vllm/csrc) into mergequant_vllm/libmergequant.so.

Everything else about the package is in pyproject.toml. Where there is no C++ compiler the package
installs without them and serves through PyTorch; MERGEQUANT_NATIVE=require makes that an error,
MERGEQUANT_NATIVE=skip does not try. CXX names the compiler, CXXFLAGS is added to the flags.
"""

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

LIBRARY = "mergequant_vllm.libmergequant"
SOURCES = Path("mergequant_vllm/csrc")
# A product and a sum must not become one operation: the definitions round twice.
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno"
FLAGS += " -fno-trapping-math -fopenmp -Wall -Wextra"
AVX2 = "-mavx2 -mf16c -mprfchw"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq"
# Each instruction set is a file of its own in isa/; dispatch.cpp runs on any CPU and chooses.
UNITS = {
    "x86_64": {"avx2": AVX2, "avx512": AVX512, "avx512vnni": f"{AVX512} -mavx512vnni"},
    "aarch64": {"neon": "-march=armv8.2-a+dotprod"},
}
COMPILERS = ("c++", "g++", "clang++")


class BuildNative(build_ext):
    """Compiles each unit with its own flags; setuptools knows only one set for all."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name of the library, which is no Python module and has no tag of the interpreter."""
        return fullname.replace(".", os.sep) + ".so"

    def run(self) -> None:
        """What an earlier build left must not pass for this one's."""
        name = self.get_ext_filename(LIBRARY)
        Path(self.build_lib, name).unlink(missing_ok=True)
        if self.inplace or self.editable_mode:
            Path(name).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; raises CompileError, which `optional` turns into a warning."""
        wish = os.environ.get("MERGEQUANT_NATIVE", "")
        if wish == "skip":
            self.warn("MERGEQUANT_NATIVE=skip: no native CPU kernels")
            return
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            self._compile(target)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            if wish == "require":
                raise SystemExit(f"The native CPU kernels cannot be built:\n{said}") from error
            raise CompileError(
                f"no native CPU kernels, linears will run in PyTorch: {said}"
            ) from error

    def _compile(self, target: Path) -> None:
        compiler = _compiler()
        scratch = Path(self.build_temp)
        scratch.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        units = {"isa/portable": "", "dispatch": "", "torch_operators": ""}
        units |= {f"isa/{name}": x for name, x in UNITS.get(_machine(compiler), {}).items()}
        common = [*compiler, *shlex.split(FLAGS), f"-I{SOURCES}"]
        common += shlex.split(os.environ.get("CXXFLAGS", ""))

        def compile_unit(unit: str) -> str:
            output = str(scratch / f"{unit.replace('/', '-')}.o")
            flags = [*shlex.split(units[unit]), "-c", str(SOURCES / f"{unit}.cpp"), "-o", output]
            _run([*common, *flags])
            return output

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        linked = target.with_suffix(".so.new")
        _run([*compiler, "-shared", *objects, "-o", str(linked), *_openmp(compiler)])
        linked.replace(target)


class AnyPython(bdist_wheel):
    """A wheel of the platform, for every Python: the library is called through ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        """Tag of the wheel, such as py3-none-linux_x86_64."""
        return ("py3", "none", super().get_tag()[2])


class WithLibrary(Distribution):
    """A distribution that holds something compiled."""

    def has_ext_modules(self) -> bool:
        """Return True, so that the wheel is one of a platform."""
        return True


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    found = named or [name for name in COMPILERS if shutil.which(name)][:1]
    if not found:
        raise FileNotFoundError(f"none of {', '.join(COMPILERS)} is installed")
    return found


def _machine(compiler: list[str]) -> str:
    """What is compiled for, which need not be what compiles: `x86_64`, `aarch64`."""
    return _run([*compiler, "-dumpmachine"]).split("-")[0]


def _openmp(compiler: list[str]) -> list[str]:
    """Flags that link OpenMP: none with GCC, whose library is PyTorch's, whose threads vLLM binds.

    Clang's calls need Clang's own library, whose threads nobody has bound.
    """
    return ["-fopenmp"] if "clang" in _run([*compiler, "--version"]).lower() else []


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


sources = [str(path) for path in sorted(SOURCES.rglob("*.cpp"))]
headers = [str(path) for path in sorted(SOURCES.rglob("*.h"))]
setup(
    ext_modules=[Extension(LIBRARY, sources, depends=headers, optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
    distclass=WithLibrary,
)
